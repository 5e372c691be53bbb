"""``Solver``: how to integrate, as a frozen record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from cnf.registry import record, unknown_name

ADAPTIVE = tuple(
    name for name, cls in SOLVERS.items() if issubclass(cls, RKAdaptiveStepsizeODESolver)
)
FIXED = tuple(name for name, cls in SOLVERS.items() if issubclass(cls, FixedGridODESolver))
MULTISTEP = tuple(name for name, cls in SOLVERS.items() if issubclass(cls, AdamsBashforthMoulton))
ONE_STEP = tuple(name for name in FIXED if name not in MULTISTEP)
SCIPY = "scipy_solver"
METHODS = tuple(SOLVERS)
GRADIENTS = ("adjoint", "backprop", "checkpoint")
NORMS = ("batch", "sample")
# of Inductor, as torch.compile names them
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# samples that a core's own cache serves well, where operations are compiled and where they are not:
# what a step of a usual field writes and reads fits there, and a call pays for itself
ROWS_COMPILED, ROWS = 1024, 4096
# methods with an interpolant that is good enough for integrals by quadrature
WITH_QUADRATURE = ("dopri5",)

# what only torchdiffeq's own loop over steps knows how to do
_LOOP_OPTIONS = {"step_t", "jump_t", "perturb"}
_ADAPTIVE_OPTIONS = (
    "first_step", "max_step", "safety", "ifactor", "dfactor", "step_t", "jump_t",
)  # fmt: skip
# what torchdiffeq takes as an option and a solver says with a field of its own
_SAID_ELSEWHERE = {
    "min_step": "Solver(min_step=...)",
    "max_num_steps": "Solver(max_steps=...)",
    "step_size": "Solver(step_size=...)",
    "norm": "Solver(norm=...)",
}


def options_of(method: str) -> tuple[str, ...]:
    """The names of the options that a method takes."""
    if method in ADAPTIVE:
        return _ADAPTIVE_OPTIONS
    if method in MULTISTEP:
        return ("perturb", "max_order", "max_iters")
    return ("solver", "max_step") if method == SCIPY else ("perturb",)


@record
@dataclasses.dataclass(frozen=True)
class Solver:
    """How to integrate an ODE and how to differentiate through it.

    Attributes:
        method: any torchdiffeq method; ``docs/solvers.md`` lists them.
        rtol: relative tolerance per step of adaptive methods.
        atol: absolute tolerance per step.
        gradient: ``"adjoint"`` solves a second ODE backwards, in constant memory;
            ``"backprop"`` keeps every operation and has derivatives of any order;
            ``"checkpoint"`` keeps one state per accepted step and recomputes each step:
            the gradient of backprop, with one step's activations in memory.
        adjoint_method: the method of the adjoint's backward pass; None means the same.
        adjoint_rtol: its relative tolerance; None means the same.
        adjoint_atol: its absolute tolerance; None means the same.
        options: what else the method takes, such as ``{"first_step": 0.01}``.
        adjoint_options: the same for ``adjoint_method``; empty means ``options`` where it applies.
        seminorm: leave the parameters' gradients out of the backward pass's error norm (Kidger
            et al., "Hey, that's not an ODE", ICML 2021).
        norm: ``"sample"`` bounds the error of every sample; ``"batch"`` bounds the root mean
            square error over the batch, for fewer steps.
        quadrature: take what is only integrated (log-determinant, costs) by quadrature along each
            step, for half the divergences of carrying it in the state and smaller errors; None
            does so where it can, with dopri5 under ``"adjoint"`` and ``"checkpoint"``.
        step_size: the step of fixed-grid methods; None means a fortieth of the time span. Steps
            are evenly spaced between two requested times, and always end on them.
        max_steps: accepted and rejected steps in one pass before ``TooManySteps``;
            ``scipy_solver``, which does not tell its steps, gets ten evaluations for each.
        min_step: the step below which ``StepUnderflow`` is raised; None means the resolution of
            the state's dtype.
        checkpoints: under ``"checkpoint"``, keep at most so many states and recompute the
            others; None keeps one per accepted step.
        rows: solve at most so many samples together; those of a larger batch are solved in even
            groups, one after the other, each with steps of its own. None chooses on a CPU what its
            caches serve well, for each thread 1,024 compiled and 4,096 uncompiled, and on a GPU
            all. A field that couples the samples of a batch, or does not say that it does not
            (``couples_batch = False``), always has all of them.
        compile: make one piece of code of every step, and where it can be of all steps of a way
            (``docs/solvers.md``), by ``torch.compile`` (True), or by the mode or backend of it that
            is named; for Runge-Kutta methods under ``"adjoint"`` and ``"checkpoint"``. The first
            solve pays for it, one to three minutes where nothing is cached on disk.
            ``"reduce-overhead"`` makes a CUDA graph of every step.
        fallback: a fixed-grid method that takes over, with a ``SolverWarning``, when a pass ends
            in ``StepUnderflow`` or ``TooManySteps``; None raises them.
        fallback_steps: its number of steps.

    Example:
        >>> Solver("rk4", step_size=0.05, gradient="backprop").method
        'rk4'
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-6
    gradient: str = "adjoint"
    adjoint_method: str | None = None
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    adjoint_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    seminorm: bool = True
    norm: str = "sample"
    quadrature: bool | None = None
    step_size: float | None = None
    max_steps: int = 2000
    min_step: float | None = None
    checkpoints: int | None = None
    rows: int | None = None
    compile: bool | str = False
    fallback: str | None = None
    fallback_steps: int = 40

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "adjoint_options", dict(self.adjoint_options))
        for kind, name, known in (
            ("method", self.method, METHODS),
            ("method", self.adjoint_method, METHODS),
            ("fixed-grid method", self.fallback, ONE_STEP),
            ("gradient mode", self.gradient, GRADIENTS),
            ("error norm", self.norm, NORMS),
        ):
            if name is not None and name not in known:
                raise unknown_name(kind, name, dict.fromkeys(known))
        for field in ("rtol", "atol", "adjoint_rtol", "adjoint_atol", "step_size", "min_step"):
            value = getattr(self, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be a positive number, got {value!r}")
        for field in ("max_steps", "checkpoints", "rows", "fallback_steps"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        _check_options("options", self.options, self.method)
        _check_options("adjoint_options", self.adjoint_options, self.backward_method)
        self._check_combination()

    def _check_combination(self) -> None:
        if self.step_size is not None and not {self.method, self.backward_method} & set(FIXED):
            raise ValueError(
                f"step_size is for fixed-grid methods ({', '.join(FIXED)}); {self.method!r} "
                "chooses its steps: set rtol and atol, or options={'max_step': ...}"
            )
        if self.gradient == "backprop" and self.method == SCIPY:
            raise ValueError(
                f"{SCIPY!r} leaves torch, so nothing can be backpropagated through it; use "
                "gradient='adjoint'"
            )
        if self.gradient == "checkpoint" and self.method in (SCIPY, *MULTISTEP):
            raise ValueError(
                f"gradient='checkpoint' recomputes single steps, which {self.method!r} does not "
                "have; use a Runge-Kutta method, or gradient='adjoint'"
            )
        if self.gradient == "checkpoint" and self.options.keys() & _LOOP_OPTIONS:
            raise ValueError(
                "gradient='checkpoint' takes none of the options step_t, jump_t and perturb; ask "
                "integrate for those times, or use gradient='backprop'"
            )
        if self.checkpoints is not None and self.gradient != "checkpoint":
            raise ValueError(
                f"checkpoints belongs to gradient='checkpoint', and this is {self.gradient!r}"
            )
        if self.quadrature and not self.has_quadrature:
            raise ValueError(
                f"quadrature=True is for {', '.join(WITH_QUADRATURE)} without the options step_t, "
                "jump_t and perturb, under gradient='adjoint' or 'checkpoint'; this is "
                f"{self.method!r} under {self.gradient!r}"
            )
        if self.compile and not self.compiles:
            raise ValueError(
                "compile is for Runge-Kutta methods without the options step_t, jump_t and "
                "perturb, under gradient='adjoint' or 'checkpoint'; this is "
                f"{self.method!r} under {self.gradient!r}"
            )

    @property
    def has_quadrature(self) -> bool:
        """Whether its steps can take integrals by quadrature."""
        return self.compiles and self.method in WITH_QUADRATURE

    @property
    def compiles(self) -> bool:
        """Whether its steps can be compiled."""
        return self.walks and self.gradient != "backprop"

    @property
    def backend(self) -> str:
        """The backend of ``torch.compile``."""
        named = isinstance(self.compile, str) and self.compile not in MODES
        return str(self.compile) if named else "inductor"

    @property
    def mode(self) -> str | None:
        """The mode of ``torch.compile``, where one is named."""
        return str(self.compile) if self.compile in MODES else None

    @property
    def backward_method(self) -> str:
        """The method of the adjoint's backward pass."""
        return self.adjoint_method or self.method

    @property
    def backward_options(self) -> Mapping[str, Any]:
        """The options of the adjoint's backward pass."""
        if self.adjoint_options:
            return self.adjoint_options
        known = options_of(self.backward_method)
        return {key: value for key, value in self.options.items() if key in known}

    @property
    def walks(self) -> bool:
        """Whether our own stepper takes its steps: one-step methods without times to stop at."""
        methods = {self.method, self.backward_method}
        options = {*self.options, *self.adjoint_options}
        return methods <= {*ADAPTIVE, *ONE_STEP} and not options & _LOOP_OPTIONS

    def rows_together(self, device: torch.device) -> int | None:
        """How many samples are solved together; None: all."""
        if self.rows is not None or device.type != "cpu":
            return self.rows
        # every thread has a cache
        return torch.get_num_threads() * (ROWS_COMPILED if self.compile else ROWS)

    def backwards(self) -> Solver:
        """The solver of the adjoint's backward pass, as one that goes forward."""
        return dataclasses.replace(
            self,
            method=self.backward_method,
            rtol=self.adjoint_rtol or self.rtol,
            atol=self.adjoint_atol or self.atol,
            options=self.backward_options,
            step_size=self.step_size if self.backward_method in FIXED else None,
            adjoint_method=None,
            adjoint_options={},
            quadrature=None,
        )

    def at(self, tolerance: float | None) -> Solver:
        """The solver with this rtol and atol on average over the batch; None changes nothing."""
        if tolerance is None:
            return self
        return dataclasses.replace(
            self,
            rtol=tolerance,
            atol=tolerance,
            adjoint_rtol=None,
            adjoint_atol=None,
            norm="batch",
        )

    def on_fallback(self, span: float) -> Solver:
        """The fixed-grid solver that takes over on a time span of length ``span``."""
        if self.fallback is None:
            raise ValueError("this solver has no fallback")
        return dataclasses.replace(
            self,
            method=self.fallback,
            adjoint_method=None,
            options={},
            adjoint_options={},
            quadrature=None,
            step_size=span / self.fallback_steps,
            max_steps=max(self.max_steps, 2 * self.fallback_steps),
            fallback=None,
        )


def _check_options(field: str, options: Mapping[str, Any], method: str) -> None:
    known = options_of(method)
    for name in options:
        if name in _SAID_ELSEWHERE:
            raise ValueError(f"{field}: say {_SAID_ELSEWHERE[name]} instead of the option {name!r}")
        if name not in known:
            raise unknown_name(f"option of {method!r}", name, dict.fromkeys(known))
