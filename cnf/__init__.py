"""Continuous normalizing flows, and the discrete ones beside them, in one API.

import cnf

target = cnf.data.toy("pinwheel")
flow = cnf.ffjord(2)
history = cnf.fit(flow, target)
flow.log_prob(x), flow.sample((1000,))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cnf import bijections, data, distributions, nets, objectives, plots, transforms
from cnf.bijections import InversionError
from cnf.compare import Comparison, compare
from cnf.costs import (
    DiagonalNorm,
    DirectionalDerivative,
    HJBResidual,
    JacobianNorm,
    KineticEnergy,
    OffDiagonalNorm,
    TaylorDerivative,
    VelocityNorm,
)
from cnf.data import DataError
from cnf.data.table import DataWarning
from cnf.distributions import Base, Normal
from cnf.divergence import CoupledBatchError, Exact, Hutchinson, HutchPlusPlus
from cnf.flow import Evaluation, Flow
from cnf.measure import Estimate, bits_per_dimension, entropy, kl
from cnf.models import (
    bnaf,
    bpf,
    ffjord,
    flowpp,
    gaussianization,
    glow,
    iaf,
    maf,
    mixture,
    models,
    naf,
    ncsf,
    nice,
    nsf,
    otflow,
    planar,
    radial,
    realnvp,
    residual_flow,
    rnode,
    sospf,
    sylvester,
    unaf,
)
from cnf.objectives import (
    Batch,
    FlowMatching,
    Loss,
    MaximumLikelihood,
    Objective,
    ReverseKL,
    guided,
)
from cnf.ode import (
    NonFiniteState,
    SecondOrderGradient,
    Solver,
    SolverError,
    SolverWarning,
    StepUnderflow,
    TooManySteps,
    UntrackedTensor,
    count_nfe,
)
from cnf.registry import UnknownNameError
from cnf.storage import LoadError, load
from cnf.training import CheckpointError, History, TrainingError, fit
from cnf.transforms import Chain, Continuous, Inverse, Mapped, Request, Transform

if TYPE_CHECKING:
    from cnf.estimator import FlowDensity

__version__ = "0.1.0"

__all__ = [
    "Base", "Batch", "Chain", "CheckpointError", "Comparison", "Continuous",
    "CoupledBatchError", "DataError", "DataWarning", "DiagonalNorm", "DirectionalDerivative",
    "Estimate", "Evaluation", "Exact", "Flow", "FlowDensity", "FlowMatching", "HJBResidual",
    "History", "HutchPlusPlus", "Hutchinson", "Inverse", "InversionError", "JacobianNorm",
    "KineticEnergy", "LoadError", "Loss", "Mapped", "MaximumLikelihood", "NonFiniteState",
    "Normal", "Objective", "OffDiagonalNorm", "Request", "ReverseKL", "SecondOrderGradient",
    "Solver", "SolverError", "SolverWarning", "StepUnderflow", "TaylorDerivative",
    "TooManySteps", "TrainingError", "Transform", "UnknownNameError", "UntrackedTensor",
    "VelocityNorm", "bijections", "bits_per_dimension", "bnaf", "bpf", "compare", "count_nfe",
    "data", "distributions", "entropy", "ffjord", "fit", "flowpp", "gaussianization", "glow",
    "guided", "iaf", "kl", "load", "maf", "mixture", "models", "naf", "ncsf", "nets", "nice",
    "nsf", "objectives", "otflow", "planar", "plots", "radial", "realnvp", "residual_flow",
    "rnode", "sospf", "sylvester", "transforms", "unaf",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # scikit-learn is an extra: its face is imported when it is asked for
    if name == "FlowDensity":
        return importlib.import_module("cnf.estimator").FlowDensity
    raise AttributeError(f"module 'cnf' has no attribute {name!r}")
