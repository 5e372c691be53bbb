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
from torch.autograd import forward_ad

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
        weights: w such that Σ w u uᵀ is the identity or has it for its mean, ``(k,)``; one number
            stands for k equal ones.
    """

    velocity: Tensor
    divergence: Tensor
    samples: Tensor | None = None
    probes: Tensor | None = None
    products: Tensor | None = None
    weights: Tensor | float = 1.0


class CoupledBatchError(ValueError):
    """A field whose velocity at one sample depends on another sample."""


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
    def draw(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draw what one solve keeps fixed, probes or a basis, given the state that it starts from.

        Args:
            field: as in a call.
            t: the time at which the solve starts.
            x: the state there, ``(*batch, *event)``.
            context: ``(*batch, context_features)`` or None.
            generator: where the randomness comes from.
        """

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
        >>> t = torch.tensor(0.0)
        >>> exact(field, t, x, None, exact.draw(field, t, x, None, None)).divergence
        tensor([3., 3., 3.])
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            positive("chunk", self.chunk)

    def draw(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
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
            if products:
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
        >>> t, generator = torch.tensor(0.0), torch.Generator().manual_seed(0)
        >>> noise = estimate.draw(field, t, x, None, generator)
        >>> estimate(field, t, x, None, noise).divergence  # exact: J is diagonal
        tensor([3., 3., 3.])
    """

    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"

    def __post_init__(self) -> None:
        positive("probes", self.probes)
        known_noise(self.noise)

    @property
    def stochastic(self) -> bool:
        """True: the answer depends on the probes."""
        return True

    @property
    def estimates(self) -> int:
        """One per probe."""
        return self.probes

    def draw(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
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
        quadratic = getattr(field, "quadratic", None)
        if quadratic is not None and not products:
            velocity, samples = quadratic(t, x, context, noise)
            return Linearization(velocity, samples.mean(0), samples)
        velocity, images = push(field, t, x, context, noise)
        samples = inner(noise, images, event_dims(field))
        return Linearization(velocity, samples.mean(0), samples, noise, images, 1 / self.probes)


@record
@dataclasses.dataclass(frozen=True)
class HutchPlusPlus(Divergence):
    """tr J = tr(QᵀJQ) + tr(PJP), P = I - QQᵀ: exact on a few directions, Hutchinson on the rest.

    Each sample's basis Q spans what J makes of random vectors at the start of the solve (one
    evaluation more) and stays fixed, so that the estimate is unbiased at every time; its variance
    is Hutchinson's of PJP, small where a few directions carry most of J.

    Args:
        probes: how many probes estimate the rest.
        rank: how many directions are exact; no more than the event has entries.
        noise: ``"rademacher"`` (±1) or ``"gaussian"``.

    Paper: Meyer et al., "Hutch++: Optimal stochastic trace estimation", SOSA 2021.

    Example:
        >>> import torch
        >>> field = lambda t, x, context: x.sum(-1, keepdim=True).expand_as(x)  # J has rank one
        >>> estimate, t, x = HutchPlusPlus(rank=1), torch.tensor(0.0), torch.ones(3, 4)
        >>> noise = estimate.draw(field, t, x, None, torch.Generator().manual_seed(0))
        >>> trace = estimate(field, t, x, None, noise).divergence
        >>> torch.allclose(trace, torch.tensor(4.0))
        True
    """

    probes: int = 1
    rank: int = 2
    noise: Literal["rademacher", "gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        positive("probes", self.probes)
        positive("rank", self.rank)
        known_noise(self.noise)

    @property
    def stochastic(self) -> bool:
        """True: the answer depends on the probes."""
        return True

    @property
    def estimates(self) -> int:
        """One per probe."""
        return self.probes

    @torch.no_grad()
    def draw(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The basis and the probes, which are orthogonal to it: ``(rank + probes, *x.shape)``."""
        batch_dims = x.dim() - event_dims(field)
        rank = min(self.rank, x.shape[batch_dims:].numel())
        noise = draw_probes((rank + self.probes, *x.shape), self.noise, x, generator)
        _, images = push(field, t, x, context, noise[:rank])
        # one matrix per sample, (*batch, entries, columns)
        columns, probes = (
            vectors.flatten(1 + batch_dims).movedim(0, -1) for vectors in (images, noise[rank:])
        )
        basis = torch.linalg.qr(columns).Q
        rest = probes - basis @ (basis.mT @ probes)
        return torch.cat([basis, rest], -1).movedim(-1, 0).reshape(noise.shape)

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
        terms = inner(noise, images, event_dims(field))
        rank = noise.shape[0] - self.probes
        samples = terms[:rank].sum(0) + terms[rank:]
        weights = x.new_ones(noise.shape[0])
        weights[rank:] /= self.probes
        return Linearization(velocity, samples.mean(0), samples, noise, images, weights)


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
    forward-mode differentiation under ``vmap``, or one tangent at a time where ``vmap`` cannot
    (branches, unknown operations), by dual numbers where ``torch.func`` cannot (writes, own grads).

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
    x = x.contiguous()  # forward mode writes tangents in the layout of an expanded x and fails

    def at(x: Tensor) -> Tensor:
        return velocity_of(field, t, x, context)

    if torch.compiler.is_compiling():
        velocity, product = _linearized(at, (x,))
        # of a copy: a compiler takes what it is given apart outside of the loop that it is in
        return velocity, torch.stack([product((tangent,)) for tangent in tangents.clone()])

    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(at, (x,), (tangent,))

    try:
        return torch.func.vmap(along, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        if not any(word in str(error) for word in ("vmap", "atching rule", " transform")):
            raise
    try:
        pairs = [along(tangent) for tangent in tangents]
    except RuntimeError as error:
        if " transform" not in str(error):
            raise
        pairs = [_dual(at, x, tangent) for tangent in tangents]
    return pairs[0][0], torch.stack([product for _, product in pairs])


def _dual(function: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value and its derivative along u, by dual numbers alone."""
    kept = torch.is_grad_enabled()
    # custom functions, as the adjoint is one, switch forward mode off inside themselves
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        # or else a field that differentiates by x would detach it, and its tangent would be lost
        x = x if x.requires_grad else x.detach().requires_grad_()
        value, product = forward_ad.unpack_dual(function(forward_ad.make_dual(x, u)))
    if product is None:
        raise ValueError("the velocity does not depend on x, or on a detached copy of it alone")
    return (value, product) if kept else (value.detach(), product.detach())


def jvp(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """A function's value and its derivative along a direction, in one forward-mode pass."""
    if torch.compiler.is_compiling():
        value, product = _linearized(function, at)
        return value, product(along)
    value, derivative, *_ = torch.func.jvp(function, at, along)
    return value, derivative


def _linearized(
    function: Callable[..., Tensor], at: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[tuple[Tensor, ...]], Tensor]]:
    """A function's value and its derivatives along directions, in reverse mode.

    For compilers, which cannot follow forward mode where a size is a variable. J u is the
    derivative of w ↦ Jᵀ w, which is linear in w, pulled back along u.
    """
    value = function(*at)

    def pulled(w: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(function, *at)[1](w)

    _, push = torch.func.vjp(pulled, torch.zeros_like(value))  # type: ignore[misc]
    return value, lambda along: push(along)[0]


def velocity_of(field: Field, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    """The field's velocity, checked to be one.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has another shape than the state.
    """
    velocity = field(t, x, context)
    if not isinstance(velocity, Tensor):
        raise TypeError(
            f"the velocity must be a tensor of the state's shape {tuple(x.shape)}, and the field "
            f"returned {type(velocity).__name__}"
        )
    # what is compiled has been evaluated for its checks before
    if not torch.compiler.is_compiling() and velocity.shape != x.shape:
        raise ValueError(
            f"the velocity must have the shapes of the state, {[tuple(x.shape)]}, and has "
            f"{[tuple(velocity.shape)]}"
        )
    return velocity


def refuse_coupling(field: Field, t: Tensor, x: Tensor, context: Tensor | None) -> None:
    """Raise for a field that couples the samples of a batch: its trace is no log-determinant.

    The first sample of a few is moved, and the velocity of the others must not notice. Fields that
    say so (``couples_batch = False``), or that bring a trace of their own, are believed.

    Raises:
        CoupledBatchError: naming the samples.
    """
    if hasattr(field, "trace") or not getattr(field, "couples_batch", True):
        return
    rows = x.detach().reshape(-1, *x.shape[x.dim() - event_dims(field) :])[:4]
    if len(rows) < 2:
        return
    if context is not None:
        context = context.detach().reshape(-1, context.shape[-1])[:4]
    moved = torch.cat([rows[:1] + 1, rows[1:]])
    with torch.no_grad():
        before = velocity_of(field, t, rows, context)
        after = velocity_of(field, t, moved, context)
    # what is not finite is for the solver to name
    touched = (before != after) & before.isfinite() & after.isfinite()
    for sample in range(1, len(rows)):
        if touched[sample].any():
            raise CoupledBatchError(
                f"the velocity of sample {sample} depends on sample 0 (or on noise): the trace of "
                "each sample's own Jacobian is then not the log-determinant, and a density would "
                "depend on its batch. Take what mixes samples out of the field (batch "
                "normalisation in training, a mean over the batch, attention across it); where "
                "samples belong together, make them one event with an attribute event_dims"
            )


def known_noise(noise: str) -> None:
    """Refuse a kind of probes that is not known."""
    if noise not in ("rademacher", "gaussian"):
        raise ValueError(f"noise is 'rademacher' or 'gaussian', got {noise!r}")


def positive(name: str, value: int) -> None:
    """Refuse a count below one."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
