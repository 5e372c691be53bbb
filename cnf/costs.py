"""Costs along the path of a continuous flow: integrands that the objective may weigh.

Each is integrated over |dt| in the velocity's own time, from 0 to the end time, whichever way the
solver walks, beside the state in the same solve. A cost reads what the divergence has computed
already; what it computes itself goes through forward-mode products, so that every gradient mode
differentiates it once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.divergence import Exact, Field, Linearization, event_dims, inner, jvp
from cnf.registry import record

Curve = Callable[[Tensor, Tensor], Tensor]


class PathPoint(NamedTuple):
    """Where on the path an integrand is asked for, and what is known there already."""

    field: Field
    t: Tensor
    x: Tensor
    context: Tensor | None
    linearization: Linearization

    def square(self, vectors: Tensor) -> Tensor:
        """Squared lengths over the event's axes."""
        return inner(vectors, vectors, event_dims(self.field))

    def columns(self) -> tuple[Tensor, Tensor]:
        """The event's unit vectors eᵢ and the columns J eᵢ, each ``(entries, *batch, *event)``.

        They are at hand under ``Exact`` and are computed under an estimator.
        """
        known = self.linearization
        if known.samples is not None or known.products is None or known.probes is None:
            exact = Exact()
            place = (self.field, self.t, self.x, self.context)
            known = exact(*place, exact.draw(*place, None), products=True)
        if known.products is None or known.probes is None:
            raise TypeError("an exact divergence keeps its basis and its products")
        return known.probes, known.products


class Cost(ABC):
    """A non-negative integrand along the path. Subclasses are frozen records."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The key under which the integral is returned."""

    @property
    def needs_products(self) -> bool:
        """Whether the integrand reads J·u of the divergence's probes."""
        return False

    @abstractmethod
    def __call__(self, point: PathPoint) -> Tensor:
        """The integrand at a point, ``(*batch,)``."""


@record
@dataclasses.dataclass(frozen=True)
class KineticEnergy(Cost):
    """∫ ‖v‖² dt, the squared speed along the path.

    Paper: Finlay et al., "How to train your neural ODE", ICML 2020.
    """

    @property
    def name(self) -> str:
        """``kinetic_energy``."""
        return "kinetic_energy"

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared length of the velocity."""
        return point.square(point.linearization.velocity)


@record
@dataclasses.dataclass(frozen=True)
class VelocityNorm(Cost):
    """∫ ‖v‖ₚ dt: the path's length for p = 2, the sum of its coordinates' lengths for p = 1.

    For p = 1 the integrand has a kink where a coordinate turns round, and its derivative jumps
    there: gradient modes agree to what the steps resolve of that, not to the tolerance. The adjoint
    is then the nearer one; smaller steps, or ``Request(costs_in_norm=True)``, help the others.

    Args:
        order: p, 1 or 2.

    Example:
        >>> VelocityNorm(1).name
        'velocity_l1'
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"the velocity's norm is of order 1 or 2, got {self.order!r}")

    @property
    def name(self) -> str:
        """``velocity_l1`` or ``velocity_l2``."""
        return f"velocity_l{self.order}"

    def __call__(self, point: PathPoint) -> Tensor:
        """Length of the velocity."""
        velocity = point.linearization.velocity
        flat = velocity.flatten(velocity.dim() - event_dims(point.field))
        return torch.linalg.vector_norm(flat, self.order, dim=-1)


@record
@dataclasses.dataclass(frozen=True)
class JacobianNorm(Cost):
    """∫ ‖J‖²_F dt, from the products that the divergence has computed.

    With probes u, E‖J u‖² = ‖J‖²_F, so the estimate under ``Hutchinson`` and ``HutchPlusPlus`` is
    unbiased; under ``Exact`` the products are J's columns and the norm is exact.

    Paper: Finlay et al., "How to train your neural ODE", ICML 2020.
    """

    @property
    def name(self) -> str:
        """``jacobian_norm``."""
        return "jacobian_norm"

    @property
    def needs_products(self) -> bool:
        """True."""
        return True

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared Frobenius norm of J."""
        products, weights = point.linearization.products, point.linearization.weights
        if products is None:
            raise ValueError("the Jacobian's norm needs a divergence that keeps its products")
        squares = point.square(products)
        if isinstance(weights, Tensor):
            return torch.tensordot(weights, squares, 1)
        return weights * squares.sum(0)


@record
@dataclasses.dataclass(frozen=True)
class DiagonalNorm(Cost):
    """∫ Σᵢ Jᵢᵢ² dt, exact under every divergence: one product per entry of the event."""

    @property
    def name(self) -> str:
        """``diagonal_norm``."""
        return "diagonal_norm"

    @property
    def needs_products(self) -> bool:
        """True."""
        return True

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared norm of J's diagonal."""
        basis, columns = point.columns()
        return inner(basis, columns, event_dims(point.field)).square().sum(0)


@record
@dataclasses.dataclass(frozen=True)
class OffDiagonalNorm(Cost):
    """∫ Σᵢ≠ⱼ Jᵢⱼ² dt, exact under every divergence: one product per entry of the event."""

    @property
    def name(self) -> str:
        """``off_diagonal_norm``."""
        return "off_diagonal_norm"

    @property
    def needs_products(self) -> bool:
        """True."""
        return True

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared Frobenius norm of J without its diagonal."""
        basis, columns = point.columns()
        # masked and not subtracted, so that a diagonal Jacobian costs exactly nothing
        return point.square(columns * (1 - basis)).sum(0)


@record
@dataclasses.dataclass(frozen=True)
class DirectionalDerivative(Cost):
    """∫ ‖∂v/∂t + J v‖² dt, how fast the velocity changes for who moves with it.

    Args:
        steady: leave ∂v/∂t out, as FFJORD's code does: ∫ ‖J v‖² dt.
    """

    steady: bool = False

    @property
    def name(self) -> str:
        """``directional_derivative``, or ``steady_derivative``."""
        return "steady_derivative" if self.steady else "directional_derivative"

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared length of the velocity's derivative along itself."""
        elapsed = torch.zeros_like(point.t) if self.steady else torch.ones_like(point.t)
        velocity = point.linearization.velocity
        _, change = jvp(
            lambda t, x: point.field(t, x, point.context), (point.t, point.x), (elapsed, velocity)
        )
        return point.square(change)


@record
@dataclasses.dataclass(frozen=True)
class TaylorDerivative(Cost):
    """R_K = ∫ ‖dᴷx/dtᴷ‖² dt, the K-th total derivative along the path.

    Its price grows with 2ᴷ evaluations of the velocity.

    Args:
        order: K from 1 (the kinetic energy) to 6.

    Paper: Kelly et al., "Learning differential equations that are easy to solve" (TayNODE),
    NeurIPS 2020.

    Example:
        >>> TaylorDerivative(3).name
        'taylor_3'
    """

    order: int = 3

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and 1 <= self.order <= 6):
            raise ValueError(f"order must be an integer from 1 to 6, got {self.order!r}")

    @property
    def name(self) -> str:
        """``taylor_K``."""
        return f"taylor_{self.order}"

    def __call__(self, point: PathPoint) -> Tensor:
        """Squared length of the total derivative."""

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return point.field(t, x, point.context)

        derivative: Curve = velocity
        for _ in range(self.order - 1):
            derivative = total_derivative(derivative, velocity)
        return point.square(derivative(point.t, point.x))


@record
@dataclasses.dataclass(frozen=True)
class HJBResidual(Cost):
    """∫ |∂Φ/∂t - ½‖v‖²| dt for v = -∇Φ, zero where the paths are straight: optimal transport's.

    The field has to offer ``potential(t, x, context) -> Φ``, as ``cnf.nets.PotentialField`` does.
    The integrand has a kink where the residual changes its sign, see ``VelocityNorm``.

    Paper: Onken et al., "OT-Flow", AAAI 2021.
    """

    @property
    def name(self) -> str:
        """``hjb_residual``."""
        return "hjb_residual"

    def __call__(self, point: PathPoint) -> Tensor:
        """How far Φ is from solving the Hamilton-Jacobi-Bellman equation."""
        potential = getattr(point.field, "potential", None)
        if potential is None:
            raise TypeError(
                "the HJB residual needs a velocity that is the gradient of a potential: a field "
                "with a method potential(t, x, context), such as cnf.nets.PotentialField; "
                f"{type(point.field).__name__} has none"
            )
        _, rate = jvp(
            lambda t: potential(t, point.x, point.context), (point.t,), (torch.ones_like(point.t),)
        )
        return (rate - 0.5 * point.square(point.linearization.velocity)).abs()


def total_derivative(quantity: Curve, velocity: Curve) -> Curve:
    """d/dt of q(t, x(t)) along dx/dt = v(t, x): ∂q/∂t + (∂q/∂x) v."""

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        tangents = (torch.ones_like(t), velocity(t, x))
        return jvp(quantity, (t, x), tangents)[1]

    return derivative
