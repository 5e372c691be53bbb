"""Explicit Runge-Kutta methods: their tableaux, and one step of them.

The tableaux of the adaptive methods are read from torchdiffeq, so that steps of the same sizes give
the same solution but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

REACH = 4.0
FlatRhs = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class Tableau(NamedTuple):
    """A Runge-Kutta method as numbers.

    Attributes:
        order: what step control divides by; no integer, which a compiler would take for one that
            may vary.
        nodes: c, the places of the stages in the step; the first is 0.
        stages: A, the row of each stage.
        weights: b, what the stages add to the solution.
        error: what they add to the error estimate; empty on a fixed grid.
        middle: what they add to the state in the middle of the step; empty on a fixed grid.
    """

    order: float
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()
    middle: tuple[float, ...] = ()

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is the derivative at the end: the first stage of the next step."""
        return len(self.nodes) > 1 and self.stages[-1] == self.weights[:-1]

    @property
    def used(self) -> int:
        """How many stages the state at the end needs."""
        return len(self.nodes) - self.reuses_last


_THIRD = 1 / 3
_FIXED_TABLEAUX = {
    "euler": Tableau(1.0, (0.0,), ((),), (1.0,)),
    "midpoint": Tableau(2.0, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun2": Tableau(2.0, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "heun3": Tableau(
        3.0, (0.0, _THIRD, 2 * _THIRD), ((), (_THIRD,), (0.0, 2 * _THIRD)), (0.25, 0.0, 0.75)
    ),
    "rk4": Tableau(
        4.0,
        (0.0, _THIRD, 2 * _THIRD, 1.0),
        ((), (_THIRD,), (-_THIRD, 1.0), (1.0, -1.0, 1.0)),
        (0.125, 0.375, 0.375, 0.125),
    ),
}


@functools.cache
def tableau(method: str) -> Tableau:
    """The tableau of a Runge-Kutta method."""
    if method in _FIXED_TABLEAUX:
        return _FIXED_TABLEAUX[method]
    table = SOLVERS[method].tableau
    return Tableau(
        float(SOLVERS[method].order),
        (0.0, *table.alpha.tolist()),
        ((), *[tuple(row.tolist()) for row in table.beta]),
        tuple(table.c_sol.tolist()),
        tuple(table.c_error.tolist()),
        tuple(SOLVERS[method].mid.tolist()),
    )


class Step(NamedTuple):
    """One step: where it starts and its signed size."""

    time: float
    size: float


class Trial(NamedTuple):
    """A step that may yet be rejected.

    Attributes:
        after: the state at its end.
        first: the derivative at its start.
        last: the derivative at its end, where the method has it.
        ratio: the norm of the error over what is tolerated, a scalar.
    """

    after: Tensor
    first: Tensor
    last: Tensor | None
    ratio: Tensor


class Steps(Protocol):
    """A method that takes steps of one problem, on flat vectors."""

    def begin(self, time: float, y: Tensor, sign: float) -> tuple[Tensor, float]:
        """The derivative at the start, and the size of a first step (Hairer et al., II.4)."""

    def trial(self, step: Step, y: Tensor, slope: Tensor | None) -> Trial:
        """A step and its error; ``slope`` is the derivative at its start, where it is known."""

    def step(self, step: Step, y: Tensor) -> Tensor:
        """The state at the end of a step."""

    def pull(
        self, step: Step, y: Tensor, adjoint: Tensor, tracked: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The products of the adjoint at a step's end and its derivatives by y and by ``tracked``.

        The latter are to be summed over steps; None stands for what a step does not use.
        """

    def gradients(
        self, sums: Sequence[Tensor | None], tracked: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The gradients of ``tracked`` in sums of what ``pull`` gave."""


class PlainSteps:
    """Steps taken operation by operation.

    Args:
        rhs: the right-hand side on flat vectors.
        table: the method.
        rtol: relative tolerance.
        atol: absolute tolerance.
        norm: of a flat error.
    """

    def __init__(self, rhs: FlatRhs, table: Tableau, rtol: float, atol: float, norm: Norm):
        self.rhs = rhs
        self.table = table
        self.rtol, self.atol = rtol, atol
        self.norm = norm

    def begin(self, time: float, y: Tensor, sign: float) -> tuple[Tensor, float]:
        """The derivative at the start, and the size of a first step."""
        slope = evaluate(self.rhs, time, y)
        scale = self.atol + self.rtol * y.abs()
        change = self.norm(self._steering(slope) / scale)
        guess = first_guess(self.norm(y / scale), change)
        ahead = self.rhs((time + sign * guess).to(y), y + sign * guess * slope)
        bend = self.norm(self._steering(ahead - slope) / scale)
        return slope, float(first_size(guess, change, bend, self.table.order))

    def trial(self, step: Step, y: Tensor, slope: Tensor | None) -> Trial:
        """A step and its error."""
        after, slopes = self._stages(step, y, slope)
        last = None
        if self.table.reuses_last:
            last = evaluate(self.rhs, step.time + step.size, after)
            slopes.append(last)
        scale = self.atol + self.rtol * torch.max(y.abs(), after.abs())
        error = combine(torch.zeros_like(y), step.size, self.table.error, slopes)
        return Trial(after, slopes[0], last, self.norm(error / scale))

    def step(self, step: Step, y: Tensor) -> Tensor:
        """The state at the end of a step."""
        return self._stages(step, y, None)[0]

    def pull(
        self, step: Step, y: Tensor, adjoint: Tensor, tracked: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The products of the adjoint at a step's end and its derivatives."""
        with torch.enable_grad():
            start = y.detach().requires_grad_()
            after = self.step(step, start)
        # retained, because parameters may share what they were computed from
        found = torch.autograd.grad(
            after, (start, *tracked), adjoint, allow_unused=True, retain_graph=True
        )
        return found[0], found[1:]

    def gradients(
        self, sums: Sequence[Tensor | None], tracked: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The sums themselves."""
        return sums

    def _steering(self, slope: Tensor) -> Tensor:
        """What of a derivative the first step's size depends on."""
        return slope

    def _stages(self, step: Step, y: Tensor, slope: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        table = self.table
        slopes = [evaluate(self.rhs, step.time, y) if slope is None else slope]
        for i in range(1, table.used):
            at = combine(y, step.size, table.stages[i], slopes)
            slopes.append(evaluate(self.rhs, step.time + table.nodes[i] * step.size, at))
        return combine(y, step.size, table.weights, slopes), slopes


def combine(y: Tensor, size: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Y + h Σ wᵢ kᵢ."""
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            y = torch.add(y, slope, alpha=weight * size)
    return y


def evaluate(rhs: FlatRhs, time: float, y: Tensor) -> Tensor:
    """The right-hand side at a time given as a number."""
    return rhs(torch.full((), time, dtype=y.dtype, device=y.device), y)


def first_guess(value: Tensor, change: Tensor) -> Tensor:
    """A size at which to look at the second derivative, from the norms of y and y'."""
    value, change = value.double(), change.double()
    return torch.where((value < 1e-5) | (change < 1e-5), 1e-6, 0.01 * value / change)


def first_size(guess: Tensor, change: Tensor, bend: Tensor, order: float) -> Tensor:
    """The first step's size from the guess and the norms of y' and of how it changes over it.

    Hairer's estimate is so cautious that the step it leads to ends with an error a thousand times
    below the tolerance: one step in six, on a flow. Here it is ``REACH`` times as long.
    """
    change, bend = change.double(), bend.double() / guess
    size = (0.01 / torch.maximum(change, bend)) ** (1 / order)
    still = (change <= 1e-15) & (bend <= 1e-15)
    size = torch.where(still, (1e-3 * guess).clamp_min(1e-6), REACH * size)
    return torch.minimum(100 * guess, size)
