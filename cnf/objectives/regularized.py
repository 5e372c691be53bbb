"""Likelihood with the path costs of a paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnf.costs import HJBResidual, JacobianNorm, KineticEnergy
from cnf.divergence import Hutchinson
from cnf.objectives.likelihood import MaximumLikelihood

if TYPE_CHECKING:
    from cnf.flow import Flow


def rnode(flow: Flow) -> MaximumLikelihood:
    """RNODE: −log p + 0.01 ∫ ‖v‖² dt + 0.01 ∫ ‖J‖²_F dt, in nats per event.

    The paper estimates trace and norm with one Hutchinson probe throughout. So do images here;
    vectors train with the flow's own trace, exact by default, which gives the exact norm of J along
    with it. In the authors' code the loss is in bits per dimension and the costs are means over
    dimensions (of ½‖v‖²), so that its 0.01 weighs less than this one.

    Paper: Finlay et al., "How to train your neural ODE", ICML 2020.
    """
    divergence = Hutchinson() if len(flow.event_shape) > 1 else None
    costs = {KineticEnergy(): 0.01, JacobianNorm(): 0.01}
    return MaximumLikelihood(flow, divergence=divergence, costs=costs)


def otflow(flow: Flow) -> MaximumLikelihood:
    """OT-Flow: −log p + α₁ ∫ ½‖v‖² dt + α₂ ∫ |∂Φ/∂t − ½‖∇Φ‖²| dt, α = (0.01, 0.05).

    The weights are those of the authors' two-dimensional experiments, over that of −log p.

    Paper: Onken et al., "OT-Flow", AAAI 2021.
    """
    return MaximumLikelihood(flow, costs={KineticEnergy(): 0.005, HJBResidual(): 0.05})
