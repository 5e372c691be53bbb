"""Solving ordinary differential equations; the only importer of torchdiffeq."""

from cnf.ode.errors import (
    CompilationError,
    NonFiniteState,
    SecondOrderGradient,
    SolverError,
    SolverWarning,
    StepUnderflow,
    TooManySteps,
    UntrackedTensor,
)
from cnf.ode.integrate import integrate
from cnf.ode.recorder import Recorder, Stats, Work, count_nfe
from cnf.ode.solver import METHODS, Solver

__all__ = [
    "METHODS",
    "CompilationError",
    "NonFiniteState",
    "Recorder",
    "SecondOrderGradient",
    "Solver",
    "SolverError",
    "SolverWarning",
    "Stats",
    "StepUnderflow",
    "TooManySteps",
    "UntrackedTensor",
    "Work",
    "count_nfe",
    "integrate",
]
