"""The trace of a field's Jacobian: exact, or estimated with probes that are fixed for a solve.

Every estimator works from forward-mode products J·u, which need no tape: value and products come
out of one pass, and a training step differentiates through them once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cnf.registry import record

Field = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Linearization(NamedTuple):
    """A field at a point, with what was learned of its Jacobian J there.

    Attributes:
        velocity: ``(*batch, *event)``.
        divergence: tr J or its estimate, ``(*batch,)``.
        samples: independent estimates whose mean is ``divergence``, ``(n, *batch)``; None if exact.
        probes: the directions u that were pushed through J, ``(k, *batch, *event)``, or None.
        products: J·u for each probe, or None where nobody asked for them.
    """

    velocity: Tensor
    divergence: Tensor
    samples: Tensor | None = None
    probes: Tensor | None = None
    products: Tensor | None = None


class Divergence(ABC):
    """How the divergence is computed. Subclasses are frozen records."""

    @property
    def stochastic(self) -> bool:
        """Whether the answer depends on the noise that was drawn."""
        return False

    @property
    def estimates(self) -> int:
        """How many independent estimates one evaluation makes; their spread gives the error."""
        return 1

    @abstractmethod
    def draw(self, field: Field, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw what one solve over states like ``x`` keeps fixed: probes, or a basis."""

    @abstractmethod
    def __call__(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        noise: Tensor,
        products: bool = False,
    ) -> Linearization:
        """Evaluate the field and its divergence.

        Args:
            field: called as ``field(t, x, context)``; a vector field unless it has an attribute
                ``event_dims`` that says how many axes its event has.
            t: the time, a scalar.
            x: ``(*batch, *event)``.
            context: ``(*batch, context_features)`` or None.
            noise: what ``draw`` returned for this solve.
            products: whether somebody will read ``probes`` and ``products``.
        """


@record
@dataclasses.dataclass(frozen=True)
class Exact(Divergence):
    """tr J from one product per dimension, all in one batched pass.

    A field with a method ``trace(t, x, context) -> (velocity, divergence)`` computes its own.

    Args:
        chunk: push at most this many basis vectors at once, to bound memory; None pushes all.

    Example:
        >>> import torch
        >>> field = lambda t, x, context: x * torch.tensor([1.0, 2.0])
        >>> exact, x = Exact(), torch.ones(3, 2)
        >>> exact(field, torch.tensor(0.0), x, None, exact.draw(field, x, None)).divergence
        tensor([3., 3., 3.])
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            positive("chunk", self.chunk)

    def draw(self, field: Field, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The basis vectors, with batch axes of size one."""
        batch_dims = x.dim() - event_dims(field)
        event = x.shape[batch_dims:]
        basis = torch.eye(event.numel(), dtype=x.dtype, device=x.device)
        return basis.reshape(event.numel(), *[1] * batch_dims, *event)

    def __call__(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        noise: Tensor,
        products: bool = False,
    ) -> Linearization:
        """Evaluate the field and its exact divergence."""
        trace = getattr(field, "trace", None)
        if trace is not None and not products:
            return Linearization(*trace(t, x, context))
        basis = noise.expand(noise.shape[0], *x.shape)
        terms, images = [], []
        for part in basis.split(self.chunk or basis.shape[0]):
            velocity, image = push(field, t, x, context, part)
            terms.append(inner(part, image, event_dims(field)))
            images.append(image)
        divergence = torch.cat(terms).sum(0)
        if not products:
            return Linearization(velocity, divergence)
        return Linearization(velocity, divergence, None, basis, torch.cat(images))


@record
@dataclasses.dataclass(frozen=True)
class Hutchinson(Divergence):
    """tr J ≈ (1/k) Σ uᵀJu with random probes u, E[uuᵀ] = I, fixed during a solve.

    Unbiased; the variance is 2‖(J + Jᵀ)/2‖²_F / k for Gaussian probes, and the same without the
    diagonal's share for Rademacher probes.

    Args:
        probes: the number k of probes.
        noise: ``"rademacher"`` (±1) or ``"gaussian"``.

    Paper: Grathwohl et al., "FFJORD", ICLR 2019; Hutchinson, 1990.

    Example:
        >>> import torch
        >>> field = lambda t, x, context: x * torch.tensor([1.0, 2.0])
        >>> estimate, x = Hutchinson(), torch.ones(3, 2)
        >>> noise = estimate.draw(field, x, torch.Generator().manual_seed(0))
        >>> estimate(field, torch.tensor(0.0), x, None, noise).divergence  # exact: J is diagonal
        tensor([3., 3., 3.])
    """

    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        positive("probes", self.probes)
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise is 'rademacher' or 'gaussian', got {self.noise!r}")

    @property
    def stochastic(self) -> bool:
        """True: the answer depends on the probes."""
        return True

    @property
    def estimates(self) -> int:
        """One per probe."""
        return self.probes

    def draw(self, field: Field, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the probes of one solve, ``(probes, *x.shape)``."""
        return draw_probes((self.probes, *x.shape), self.noise, x, generator)

    def __call__(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        noise: Tensor,
        products: bool = False,
    ) -> Linearization:
        """Evaluate the field and the estimate of its divergence."""
        velocity, images = push(field, t, x, context, noise)
        samples = inner(noise, images, event_dims(field))
        return Linearization(velocity, samples.mean(0), samples, noise, images)


def event_dims(field: Field) -> int:
    """How many trailing axes make one event of this field; a plain field acts on vectors."""
    return getattr(field, "event_dims", 1)


def inner(a: Tensor, b: Tensor, events: int) -> Tensor:
    """Inner product over the last ``events`` axes."""
    product = a * b
    return product.flatten(product.dim() - events).sum(-1)


def draw_probes(
    shape: tuple[int, ...], noise: str, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Random probes of a shape, in the dtype and on the device of ``like``."""
    if noise == "gaussian":
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    signs = torch.randint(0, 2, shape, device=like.device, generator=generator)
    return signs.to(like.dtype) * 2 - 1


def push(
    field: Field, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    """The velocity and J·u for every tangent u, in one pass where the field allows it.

    A field with a method ``push(t, x, context, tangents)`` does it itself; others go through
    forward-mode differentiation under ``vmap``, or one tangent at a time where ``vmap`` cannot.

    Args:
        field: called as ``field(t, x, context)``.
        t: the time.
        x: ``(*batch, *event)``.
        context: ``(*batch, context_features)`` or None.
        tangents: ``(k, *batch, *event)``.

    Returns:
        The velocity ``(*batch, *event)`` and the products ``(k, *batch, *event)``.
    """
    own = getattr(field, "push", None)
    if own is not None:
        return own(t, x, context, tangents)

    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: field(t, x, context), (x,), (tangent,))

    try:
        return torch.func.vmap(along, out_dims=(None, 0))(tangents)
    except (RuntimeError, ValueError) as error:
        if "vmap" not in str(error):
            raise
    pairs = [along(tangent) for tangent in tangents]
    return pairs[0][0], torch.stack([product for _, product in pairs])


def positive(name: str, value: int) -> None:
    """Refuse a count below one."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
