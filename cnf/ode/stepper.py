"""Explicit Runge-Kutta steps of our own, for the gradient that recomputes step by step.

torchdiffeq's solvers do not show their accepted steps, which a recomputation needs. The tableaux
of the adaptive methods are read from torchdiffeq, and the step control is the same (Hairer,
Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.4), so that both give
the same solution but for rounding, except that every requested time is the end of a step here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from cnf.ode.guard import Watch
from cnf.ode.solver import ADAPTIVE, Solver

FlatRhs = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class Tableau(NamedTuple):
    """A Runge-Kutta method as numbers.

    Attributes:
        order: what step control divides by.
        nodes: c, the places of the stages in the step; the first is 0.
        stages: A, the row of each stage.
        weights: b, what the stages add to the solution.
        error: what they add to the error estimate; empty on a fixed grid.
    """

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is the derivative at the end: the first stage of the next step."""
        return len(self.nodes) > 1 and self.stages[-1] == self.weights[:-1]


DEFAULT_STEPS = 40
_THIRD = 1 / 3
_FIXED_TABLEAUX = {
    "euler": Tableau(1, (0.0,), ((),), (1.0,)),
    "midpoint": Tableau(2, (0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun2": Tableau(2, (0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "heun3": Tableau(
        3, (0.0, _THIRD, 2 * _THIRD), ((), (_THIRD,), (0.0, 2 * _THIRD)), (0.25, 0.0, 0.75)
    ),
    "rk4": Tableau(
        4,
        (0.0, _THIRD, 2 * _THIRD, 1.0),
        ((), (_THIRD,), (-_THIRD, 1.0), (1.0, -1.0, 1.0)),
        (0.125, 0.375, 0.375, 0.125),
    ),
}


def tableau(method: str) -> Tableau:
    """The tableau of a Runge-Kutta method."""
    if method in _FIXED_TABLEAUX:
        return _FIXED_TABLEAUX[method]
    table = SOLVERS[method].tableau
    return Tableau(
        SOLVERS[method].order,
        (0.0, *table.alpha.tolist()),
        ((), *[tuple(row.tolist()) for row in table.beta]),
        tuple(table.c_sol.tolist()),
        tuple(table.c_error.tolist()),
    )


class Step(NamedTuple):
    """One accepted step: where it starts and its signed size."""

    time: float
    size: float


def combine(y: Tensor, size: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Y + h Σ wᵢ kᵢ."""
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            y = torch.add(y, slope, alpha=weight * size)
    return y


def evaluate(rhs: FlatRhs, time: float, y: Tensor) -> Tensor:
    """The right-hand side at a time given as a number."""
    return rhs(torch.full((), time, dtype=y.dtype, device=y.device), y)


def rk_step(
    rhs: FlatRhs, table: Tableau, step: Step, y: Tensor, slope: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One step: the state at its end, and the slopes of the stages that the state needs.

    Args:
        rhs: the right-hand side on flat vectors.
        table: the method.
        step: where it starts and how far it goes.
        y: the state at the start, ``(size,)``.
        slope: the derivative there, where it is known.
    """
    slopes = [evaluate(rhs, step.time, y) if slope is None else slope]
    used = len(table.nodes) - table.reuses_last
    for node, row in zip(table.nodes[1:used], table.stages[1:used], strict=True):
        at = combine(y, step.size, row, slopes)
        slopes.append(evaluate(rhs, step.time + node * step.size, at))
    return combine(y, step.size, table.weights, slopes), slopes


def first_size(
    rhs: FlatRhs,
    y: Tensor,
    slope: Tensor,
    time: float,
    sign: float,
    order: int,
    solver: Solver,
    norm: Norm,
) -> float:
    """A first step's size from the scales of y, y' and y'' (Hairer et al., II.4)."""
    scale = solver.atol + solver.rtol * y.abs()
    d0, d1 = float(norm(y / scale)), float(norm(slope / scale))
    guess = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    ahead = evaluate(rhs, time + sign * guess, y + sign * guess * slope)
    d2 = float(norm((ahead - slope) / scale)) / guess
    if d1 <= 1e-15 and d2 <= 1e-15:
        return min(100 * guess, max(1e-6, guess * 1e-3))
    return min(100 * guess, (0.01 / max(d1, d2)) ** (1 / order))


def grid(times: Sequence[float], step_size: float) -> list[float]:
    """The fixed grid: evenly spaced between neighbouring times, no step above ``step_size``."""
    points = [times[0]]
    for start, end in pairwise(times):
        # the slack keeps a quotient that is whole but for rounding from adding a step
        count = max(1, math.ceil(abs(end - start) / step_size - 1e-5))
        points += [start + (end - start) * i / count for i in range(1, count)]
        points.append(end)
    return points


@dataclasses.dataclass
class Path:
    """Where a forward pass has been.

    Attributes:
        solution: the state at every requested time, ``(times, size)``.
        steps: the accepted steps.
        arrivals: how many steps lead to each requested time.
        kept: states by the number of steps before them.
    """

    solution: Tensor
    steps: list[Step]
    arrivals: list[int]
    kept: dict[int, Tensor]


def advance(
    rhs: FlatRhs, y: Tensor, times: Sequence[float], solver: Solver, norm: Norm, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    """Integrate through ``times``: each accepted step, the state after it, whether it arrives."""
    walk = _adaptive if solver.method in ADAPTIVE else _fixed
    return walk(rhs, y, times, solver, norm, watch)


def walk(
    rhs: FlatRhs,
    y: Tensor,
    times: Sequence[float],
    solver: Solver,
    norm: Norm,
    watch: Watch,
    keep: bool = True,
) -> Path:
    """Integrate through ``times``, every one of them the end of a step, and keep the way."""
    # half of the room is left for the states that the way back computes again
    limit = math.inf if solver.checkpoints is None else max(1, solver.checkpoints // 2)
    solution, arrivals = [y], [0]
    steps: list[Step] = []
    kept: dict[int, Tensor] = {}
    stride = 1
    for step, after, arrived in advance(rhs, y, times, solver, norm, watch):
        if len(steps) % stride == 0 and keep:
            kept[len(steps)] = y
        while len(kept) > limit:
            # how many steps there will be is not known: thin out whenever room runs out
            stride *= 2
            kept = {index: state for index, state in kept.items() if index % stride == 0}
        steps.append(step)
        y = after
        if arrived:
            solution.append(y)
            arrivals.append(len(steps))
    return Path(torch.stack(solution), steps, arrivals, kept)


def _adaptive(
    rhs: FlatRhs, y: Tensor, times: Sequence[float], solver: Solver, norm: Norm, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    table, options = tableau(solver.method), solver.options
    sign = 1.0 if times[-1] > times[0] else -1.0
    safety, shrink = options.get("safety", 0.9), options.get("dfactor", 0.2)
    grow, largest = options.get("ifactor", 10.0), options.get("max_step", math.inf)
    time = times[0]
    start = evaluate(rhs, time, y)
    slope: Tensor | None = start
    size = options.get("first_step")
    if size is None:
        size = first_size(rhs, y, start, time, sign, table.order, solver, norm)
    for target in times[1:]:
        while time != target:
            size = min(size, largest)
            watch.step(time, y, size)
            left = abs(target - time)
            lands = size >= left
            step = Step(time, sign * (left if lands else size))
            end = target if lands else time + step.size
            after, slopes = rk_step(rhs, table, step, y, slope)
            if table.reuses_last:
                slopes.append(evaluate(rhs, end, after))
            scale = solver.atol + solver.rtol * torch.max(y.abs(), after.abs())
            error = combine(torch.zeros_like(y), step.size, table.error, slopes)
            ratio = float(norm(error / scale))
            factor = grow if ratio == 0 else min(grow, safety / ratio ** (1 / table.order))
            if ratio <= 1:
                watch.accept(time, y, step.size)
                # a step cut short by a requested time says nothing against the longer one
                size = max(size if lands else 0.0, abs(step.size) * max(1.0, factor))
                yield step, after, lands
                time, y, slope = end, after, slopes[-1] if table.reuses_last else None
            else:
                watch.reject(time, y, step.size)
                size, slope = abs(step.size) * max(shrink, factor), slopes[0]


def _fixed(
    rhs: FlatRhs, y: Tensor, times: Sequence[float], solver: Solver, norm: Norm, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    table = tableau(solver.method)
    points = grid(times, step_size(solver, times))
    ends = set(times)
    for time, end in pairwise(points):
        watch.step(time, y, abs(end - time))
        step = Step(time, end - time)
        y, _ = rk_step(rhs, table, step, y)
        yield step, y, end in ends


def walk_back(
    rhs: FlatRhs,
    path: Path,
    gradient: Tensor,
    parameters: Sequence[Tensor],
    solver: Solver,
    watch: Watch,
) -> tuple[Tensor, list[Tensor | None]]:
    """Differentiate a walk, recomputing one step at a time from its end.

    Args:
        rhs: the right-hand side.
        path: the way that was walked.
        gradient: of the solution, ``(times, size)``.
        parameters: what else to differentiate by.
        solver: as in ``walk``.
        watch: checks every step.

    Returns:
        The gradients of the initial state and of the parameters (None for one that is not used).
    """
    table = tableau(solver.method)
    arriving = dict(zip(path.arrivals, gradient, strict=True))
    adjoint = torch.zeros_like(gradient[0])
    sums: list[Tensor | None] = [None for _ in parameters]
    index = len(path.steps)
    for state in _states_backwards(rhs, table, path, solver.checkpoints):
        if index in arriving:
            adjoint = adjoint + arriving[index]
        index -= 1
        step = path.steps[index]
        watch.step(step.time, (state, adjoint), abs(step.size))
        with torch.enable_grad():
            start = state.detach().requires_grad_()
            after, _ = rk_step(rhs, table, step, start)
            # retained, because parameters may share what they were computed from
            adjoint, *terms = torch.autograd.grad(
                after, (start, *parameters), adjoint, allow_unused=True, retain_graph=True
            )
        for i, term in enumerate(terms):
            known = sums[i]
            sums[i] = known if term is None else term if known is None else known + term
    return adjoint + arriving[0], sums


def _states_backwards(
    rhs: FlatRhs, table: Tableau, path: Path, checkpoints: int | None
) -> Iterator[Tensor]:
    kept, end = dict(path.kept), len(path.steps)
    for start in sorted(kept, reverse=True):
        room = end if checkpoints is None else max(0, checkpoints - len(kept))
        yield from _segment_backwards(rhs, table, path.steps[start:end], kept.pop(start), room)
        end = start


def _segment_backwards(
    rhs: FlatRhs, table: Tableau, steps: Sequence[Step], y: Tensor, room: int
) -> Iterator[Tensor]:
    """The states before each step, the last one first, holding at most ``room`` besides ``y``."""
    if len(steps) == 1:
        yield y
        return
    if room == 0:
        for start in reversed(range(len(steps))):
            yield _replay(rhs, table, steps[:start], y)
        return
    # room that does not hold all of them is shared by snapshots and by what lies between two
    count = len(steps) - 1 if room >= len(steps) - 1 else max(1, room // 2)
    width = math.ceil(len(steps) / (count + 1))
    starts = range(0, len(steps), width)
    snapshots = [y]
    for start in starts[:-1]:
        snapshots.append(_replay(rhs, table, steps[start : start + width], snapshots[-1]))
    for start in reversed(starts):
        held = len(snapshots) - 1
        piece = steps[start : start + width]
        yield from _segment_backwards(rhs, table, piece, snapshots.pop(), room - held)


def _replay(rhs: FlatRhs, table: Tableau, steps: Sequence[Step], y: Tensor) -> Tensor:
    for step in steps:
        y, _ = rk_step(rhs, table, step, y)
    return y


def step_size(solver: Solver, times: Sequence[float]) -> float:
    """The step of a fixed grid over ``times``."""
    return solver.step_size or abs(times[-1] - times[0]) / DEFAULT_STEPS
