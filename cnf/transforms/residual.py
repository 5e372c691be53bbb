"""Residual flows: z = x + g(x) with a contraction g."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cnf.bijections import InversionError
from cnf.bijections.base import tolerance_of
from cnf.divergence import draw_probes, inner, push
from cnf.nets.lipschitz import Contraction
from cnf.registry import record
from cnf.transforms.base import Mapped, Request, Transform

Function = Callable[[Tensor], Tensor]


class LogDet(ABC):
    """How log |det(I + ∂g/∂x)| is computed. Subclasses are frozen records."""

    @property
    def exact(self) -> bool:
        """Whether it is the number itself, not an estimate."""
        return False

    @abstractmethod
    def __call__(
        self, g: Function, x: Tensor, event_dims: int, generator: torch.Generator | None
    ) -> Tensor:
        """Independent estimates in nats, ``(estimates, *batch)``; their mean is the answer.

        Args:
            g: the contraction, from ``(*batch, *event)`` to the same.
            x: where, ``(*batch, *event)``.
            event_dims: how many axes the event has.
            generator: where probes come from.
        """


@record
@dataclasses.dataclass(frozen=True)
class ExactLogDet(LogDet):
    """The determinant of the whole Jacobian: one forward-mode product per dimension.

    For few dimensions: time and memory grow with their number, the determinant with its cube.

    Example:
        >>> import torch
        >>> samples = ExactLogDet()(lambda x: x / 2, torch.ones(3, 2), 1, None)
        >>> samples.shape, round(samples[0, 0].item(), 4)  # 2 log 1.5
        (torch.Size([1, 3]), 0.8109)
    """

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def __call__(
        self, g: Function, x: Tensor, event_dims: int, generator: torch.Generator | None
    ) -> Tensor:
        """The log-determinant, as one estimate without error."""
        event = x.shape[x.dim() - event_dims :]
        n = event.numel()
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        basis = eye.reshape(n, *[1] * (x.dim() - event_dims), *event)
        columns = _at(g, x).push(basis).expand(n, *x.shape).flatten(x.dim() - event_dims + 1)
        # row by row, because Inductor takes the factors of a transposed matrix for its transpose's
        matrix = (columns.movedim(0, -1) + eye).contiguous()
        return torch.linalg.slogdet(matrix).logabsdet.unsqueeze(0)


@record
@dataclasses.dataclass(frozen=True)
class TruncatedLogDet(LogDet):
    """The first terms of Σ_k (-1)^(k+1) tr(J^k) / k, the traces from random probes.

    Biased by what is cut off, at most features · L^(terms + 1) / ((terms + 1) (1 - L)) nats for a
    contraction with constant L. From Behrmann et al., "Invertible Residual Networks" (2019).

    Args:
        terms: how many terms.
        probes: independent estimates to average.
        noise: ``"rademacher"`` (±1) or ``"gaussian"``.
        neumann: take gradients from a Neumann series whose terms need no tape (constant memory)
            rather than by differentiating every term; the two agree in expectation.

    Example:
        >>> import torch
        >>> samples = TruncatedLogDet(20)(lambda x: x / 2, torch.ones(3, 2), 1, None)
        >>> round(samples[0, 0].item(), 4)
        0.8109
    """

    terms: int = 10
    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    neumann: bool = True

    def __post_init__(self) -> None:
        _check_counts(terms=self.terms, probes=self.probes)

    def __call__(
        self, g: Function, x: Tensor, event_dims: int, generator: torch.Generator | None
    ) -> Tensor:
        """One estimate per probe."""
        weights = [[1.0] * self.probes for _ in range(self.terms)]
        return _series(g, x, event_dims, generator, weights, self.noise, self.neumann)


@record
@dataclasses.dataclass(frozen=True)
class UnbiasedLogDet(LogDet):
    """The same series cut at a random term, each term weighted by 1 / P(it is reached).

    Unbiased (Russian roulette), and so is its gradient. With the geometric law the variance is
    finite where L² < 1 - parameter; beyond, rare large values occur. Every probe draws its own
    number of terms. From Chen et al., "Residual Flows for Invertible Generative Modeling" (2019).

    Args:
        law: of the number of terms after the certain ones: ``"geometric"`` on 0, 1, … or
            ``"poisson"``.
        parameter: the geometric's probability to stop at each term, or the Poisson's mean.
        certain: how many terms are always taken.
        probes: independent estimates to average.
        noise: ``"rademacher"`` (±1) or ``"gaussian"``.
        neumann: as in ``TruncatedLogDet``.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> estimate = UnbiasedLogDet(probes=2000)
        >>> samples = estimate(lambda x: x / 2, torch.ones(2), 1, generator)
        >>> bool((samples.mean() - 0.8109).abs() < 0.01)
        True
    """

    law: Literal["geometric", "poisson"] = "geometric"
    parameter: float = 0.5
    certain: int = 2
    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    neumann: bool = True

    def __post_init__(self) -> None:
        _check_counts(certain=self.certain, probes=self.probes)
        if self.law not in ("geometric", "poisson"):
            raise ValueError(f"law is 'geometric' or 'poisson', got {self.law!r}")
        if not 0 < self.parameter < (1 if self.law == "geometric" else math.inf):
            raise ValueError(
                f"the {self.law} law's parameter must be positive"
                f"{' and below 1' if self.law == 'geometric' else ''}, got {self.parameter}"
            )

    def __call__(
        self, g: Function, x: Tensor, event_dims: int, generator: torch.Generator | None
    ) -> Tensor:
        """One estimate per probe."""
        device = x.device if generator is None else generator.device
        uniform = torch.rand(self.probes, generator=generator, device=device, dtype=torch.float64)
        counts = [self.certain + self._draw(u) for u in uniform.tolist()]
        weights = [
            [1 / self._survival(k - self.certain) if k <= count else 0.0 for count in counts]
            for k in range(1, max(counts) + 1)
        ]
        return _series(g, x, event_dims, generator, weights, self.noise, self.neumann)

    def _survival(self, count: int) -> float:
        """P(N ≥ count)."""
        if count <= 0:
            return 1.0
        if self.law == "geometric":
            return (1 - self.parameter) ** count
        place = torch.tensor([count, self.parameter], dtype=torch.float64)
        return torch.special.gammainc(place[0], place[1]).item()

    def _draw(self, uniform: float) -> int:
        """The N with P(N > count) ≤ uniform < P(N ≥ count)."""
        count = 0
        while self._survival(count + 1) > uniform:
            count += 1
        return count


class Residual(Transform):
    """z = x + g(x), with a contraction g; the direction x → z is the formula.

    log |det dz/dx| = log det(I + ∂g/∂x) in nats, as ``log_det`` computes it. ``forward`` solves
    x = z - g(x) by fixed-point iteration until the error is below the tolerance times 1 + |x| (by
    the contraction's bound L: error ≤ step · L / (1 - L)), or the step is rounding; gradients are
    implicit, from the adjoint fixed point, and exist to first order. From Behrmann et al. (2019)
    and Chen et al. (2019).

    Args:
        net: g, for instance ``cnf.nets.lipschitz.LipschitzMLP``.
        log_det: ``ExactLogDet()`` (for few dimensions), ``TruncatedLogDet(…)`` or
            ``UnbiasedLogDet(…)``; the transform is ``exact`` with the first only.
        tolerance: of ``forward``; None for ``cnf.bijections.base.tolerance_of`` the dtype.
        max_iterations: of ``forward``.

    Example:
        >>> import torch
        >>> from cnf.nets.lipschitz import LipschitzMLP
        >>> block = Residual(LipschitzMLP(2, hidden=(16,)))
        >>> x = torch.tensor([0.5, -1.0])
        >>> torch.allclose(block(block.inverse(x).value).value, x, atol=1e-5)
        True
    """

    def __init__(
        self,
        net: Contraction,
        *,
        log_det: LogDet | None = None,
        tolerance: float | None = None,
        max_iterations: int = 2000,
    ):
        super().__init__()
        if not 0 < net.lipschitz < 1:
            raise ValueError(f"g must contract: its lipschitz is {net.lipschitz}, not below 1")
        self.net = net
        self.log_det = ExactLogDet() if log_det is None else log_det
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether ``log_det`` is the exact one."""
        return self.log_det.exact

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x by fixed-point iteration.

        Raises:
            InversionError: if it has not converged after ``max_iterations``.
        """
        g = self.net.prepare(context)
        solve = self._fixed_point
        if torch.compiler.is_dynamo_compiling():  # its length depends on the values
            solve = torch.compiler.disable(solve)
        with torch.no_grad():
            x = solve(lambda x: z - g(x), z.detach())
        if torch.is_grad_enabled():
            x = self._attach(g, z, x)
        log_det, costs = self._log_det(g, x, request)
        return Mapped(x, -log_det, costs)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z = x + g(x)."""
        g = self.net.prepare(context)
        if request is None or request.log_det:
            g = _At(g, x)
        log_det, costs = self._log_det(g, x, request)
        return Mapped(x + g(x), log_det, costs)

    def _log_det(
        self, g: Function, x: Tensor, request: Request | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log det(I + ∂g/∂x), and its variance where the request asks for that."""
        request = request or Request()
        batch = x.shape[: x.dim() - self.net.event_dims]
        if not request.log_det:
            return x.new_full(batch, math.nan), {}
        samples = self.log_det(g, x, self.net.event_dims, request.generator)
        if not request.variance:
            return samples.mean(0), {}
        if self.log_det.exact:
            return samples.mean(0), {"log_det_variance": x.new_zeros(batch)}
        if len(samples) < 2:
            raise ValueError(
                f"the variance of an estimate needs at least two of them, and {self.log_det} makes "
                "one; ask for more probes"
            )
        return samples.mean(0), {"log_det_variance": samples.var(0) / len(samples)}

    def _attach(self, g: Function, z: Tensor, x: Tensor) -> Tensor:
        """The solution x with gradients: dx = (I + J)⁻¹ (dz - dg)."""
        attached = z - g(x)
        if not attached.requires_grad:
            return attached
        start = x.detach().requires_grad_()
        image = g(start)

        def adjoint(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "the direction z → x of a residual block has first derivatives only; take "
                    "second derivatives of the direction x → z, which is a formula"
                )

            def pull(y: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(image, start, y, retain_graph=True)
                return gradient - product

            return self._fixed_point(pull, gradient)

        attached.register_hook(adjoint)
        return attached

    def _fixed_point(self, step: Function, start: Tensor) -> Tensor:
        """Iterate x ← step(x), a contraction."""
        if start.numel() == 0:
            return start
        tolerance = tolerance_of(start.dtype) if self.tolerance is None else self.tolerance
        bound = self.net.lipschitz
        limit = max(tolerance * (1 - bound) / bound, 4 * torch.finfo(start.dtype).eps)
        axes = tuple(range(-self.net.event_dims, 0))
        x = start
        for _ in range(self.max_iterations):
            last, x = x, step(x)
            moved = torch.linalg.vector_norm(x - last, dim=axes)
            # what is not a number stays so: it does not keep the others waiting
            if not bool((moved > limit * (1 + torch.linalg.vector_norm(x, dim=axes))).any()):
                return x
        raise InversionError(
            f"the fixed-point iteration of a residual block still moved by {moved.max().item():g} "
            f"after {self.max_iterations} steps; allow more (max_iterations), a larger tolerance, "
            f"or a smaller Lipschitz constant than {bound}"
        )

    def extra_repr(self) -> str:
        """How the log-determinant is computed."""
        return f"log_det={self.log_det}"


def _series(
    g: Function,
    x: Tensor,
    event_dims: int,
    generator: torch.Generator | None,
    weights: list[list[float]],
    noise: str,
    neumann: bool,
) -> Tensor:
    """Σ_k (-1)^(k+1) w_k vᵀJ^k v / k for every probe v, ``(probes, *batch)``.

    Its gradient is vᵀ(∂J) s with s = Σ_k (-1)^(k-1) w_k J^(k-1) v: by the trace's cyclic symmetry
    this has the expectation of the series' own gradient, and only one product needs a tape.
    """
    probes = draw_probes((len(weights[0]), *x.shape), noise, x, generator)
    batch_dims = x.dim() - event_dims
    table = torch.tensor(weights, dtype=x.dtype, device=x.device)
    differentiate = torch.is_grad_enabled()
    at = _at(g, x)
    with torch.set_grad_enabled(differentiate and not neumann):
        image, summed = probes, torch.zeros_like(probes)
        value = x.new_zeros(probes.shape[: 1 + batch_dims])
        for k, weight in enumerate(table, start=1):
            weight = (-1) ** (k + 1) * weight
            summed = summed + weight.reshape(-1, *[1] * x.dim()) * image
            image = at.push(image)
            value = value + weight.reshape(-1, *[1] * batch_dims) / k * inner(
                probes, image, event_dims
            )
    if not (differentiate and neumann):
        return value
    gradient = inner(probes, at.push(summed), event_dims)
    return value + gradient - gradient.detach()


class _At:
    """A function g at one point x: its value and its Jacobian's products, all from one pass."""

    def __init__(self, g: Function, x: Tensor):
        linearize = getattr(g, "linearize", None)
        if linearize is not None:
            self.value, self.push = linearize(x)
        else:
            self.value, self.push = g(x), self._differentiated(g, x)

    def __call__(self, x: Tensor) -> Tensor:
        """The value at the one point."""
        return self.value

    @staticmethod
    def _differentiated(g: Function, x: Tensor) -> Function:
        def products(tangents: Tensor) -> Tensor:
            tangents = tangents.expand(len(tangents), *x.shape)
            return push(lambda t, x, context: g(x), x.new_zeros(()), x, None, tangents)[1]

        return products


def _at(g: Function, x: Tensor) -> _At:
    """G at x, unless it is so already."""
    return g if isinstance(g, _At) else _At(g, x)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
