"""Costs along the path of a continuous flow: integrands that the objective may weigh."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from cnf.divergence import Field, Linearization, event_dims, inner
from cnf.registry import record


class PathPoint(NamedTuple):
    """Where on the path an integrand is asked for, and what is known there already."""

    field: Field
    t: Tensor
    x: Tensor
    context: Tensor | None
    linearization: Linearization


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
        velocity = point.linearization.velocity
        return inner(velocity, velocity, event_dims(point.field))


@record
@dataclasses.dataclass(frozen=True)
class JacobianNorm(Cost):
    """∫ ‖J‖²_F dt, from the products that the divergence has computed.

    With probes u, E‖J u‖² = ‖J‖²_F, so the estimate under ``Hutchinson`` is unbiased; under
    ``Exact`` the products are J's columns and the norm is exact.

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
        products, samples = point.linearization.products, point.linearization.samples
        if products is None:
            raise ValueError("the Jacobian's norm needs a divergence that keeps its products")
        squares = inner(products, products, event_dims(point.field))
        # an exact trace pushes a basis, whose squares sum to the norm; probes average to it
        return squares.sum(0) if samples is None else squares.mean(0)
