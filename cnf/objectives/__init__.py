"""What to minimise: modules that own a flow and turn a batch into a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cnf.objectives.base import Batch, Loss, Objective
from cnf.objectives.coupling import Coupling, ExactTransport, Independent, Sinkhorn
from cnf.objectives.flow_matching import FlowMatching, guided
from cnf.objectives.likelihood import MaximumLikelihood
from cnf.objectives.paths import (
    LateTimes,
    LinearPath,
    LogitNormalTimes,
    Path,
    Times,
    UniformTimes,
    VariancePreserving,
)
from cnf.objectives.regularized import otflow, rnode
from cnf.objectives.reverse_kl import ReverseKL
from cnf.registry import unknown_name

if TYPE_CHECKING:
    from cnf.flow import Flow

__all__ = [
    "OBJECTIVES", "Batch", "Coupling", "ExactTransport", "FlowMatching", "Independent",
    "LateTimes", "LinearPath", "LogitNormalTimes", "Loss", "MaximumLikelihood", "Objective",
    "Path", "ReverseKL", "Sinkhorn", "Times", "UniformTimes", "VariancePreserving",
    "build_objective", "guided",
]  # fmt: skip

#: Builders of objectives by the name that ``fit(objective=…)`` takes; each is given the flow.
OBJECTIVES: dict[str, Callable[[Flow], Objective]] = {
    "likelihood": MaximumLikelihood,
    "flow-matching": FlowMatching,
    "rnode": rnode,
    "otflow": otflow,
}


def build_objective(name: str, flow: Flow) -> Objective:
    """The objective of that name for a flow.

    Raises:
        UnknownNameError: if there is none; the message lists the names.
    """
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, OBJECTIVES)
    return OBJECTIVES[name](flow)
