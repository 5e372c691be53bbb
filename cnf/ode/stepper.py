"""The walk through an initial value problem, step by step, and the way back along it.

torchdiffeq's solvers do not show their accepted steps, which a recomputation needs. Every requested
time is the end of a step here; torchdiffeq interpolates. Compiled code takes a whole way at once
where it can (``compiled.travel``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cnf.ode.guard import Watch
from cnf.ode.runge_kutta import Step, Steps, tableau
from cnf.ode.solver import ADAPTIVE, Solver

DEFAULT_STEPS = 40
# keeps a quotient that is whole but for rounding from adding a step
SLACK = 1e-5
# how the next step follows from an error: the last one times at most, at least, and how carefully
GROW, SHRINK, SAFETY = 10.0, 0.2, 0.9


def grid(times: Sequence[float], step_size: float) -> list[float]:
    """The fixed grid: evenly spaced between neighbouring times, no step above ``step_size``."""
    points = [times[0]]
    for start, end in pairwise(times):
        count = steps_between(start, end, step_size)
        points += [start + (end - start) * i / count for i in range(1, count)]
        points.append(end)
    return points


def steps_between(start: float, end: float, step_size: float) -> int:
    """How many equal steps, none above ``step_size``, lead from one time to another."""
    return max(1, math.ceil(abs(end - start) / step_size - SLACK))


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
    taken: Steps, y: Tensor, times: Sequence[float], solver: Solver, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    """Integrate through ``times``: each accepted step, the state after it, whether it arrives."""
    walk = _adaptive if solver.method in ADAPTIVE else _fixed
    return walk(taken, y, times, solver, watch)


def walk(
    taken: Steps,
    y: Tensor,
    times: Sequence[float],
    solver: Solver,
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
    for step, after, arrived in advance(taken, y, times, solver, watch):
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
    taken: Steps, y: Tensor, times: Sequence[float], solver: Solver, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    options = solver.options
    order = tableau(solver.method).order
    sign = 1.0 if times[-1] > times[0] else -1.0
    safety, shrink = options.get("safety", SAFETY), options.get("dfactor", SHRINK)
    grow, largest = options.get("ifactor", GROW), options.get("max_step", math.inf)
    time, slope = times[0], None
    size = options.get("first_step")
    if size is None:
        slope, size = taken.begin(time, y, sign)
    for target in times[1:]:
        while time != target:
            size = min(size, largest)
            watch.step(time, y, size)
            # as many equal steps as the longest that is tolerated needs: a last one cut short would
            # cost as much as a whole one, and the others would have been longer than they must
            count = steps_between(time, target, size)
            step = Step(time, (target - time) / count)
            trial = taken.trial(step, y, slope)
            ratio = float(trial.ratio)
            factor = grow if ratio == 0 else min(grow, safety / ratio ** (1 / order))
            longest = abs(step.size) * max(shrink, factor)
            if ratio <= 1:
                watch.accept(time, y, step.size)
                # a step cut short by a requested time says nothing against the longer one
                size = max(size, longest) if count == 1 else longest
                yield step, trial.after, count == 1
                time = target if count == 1 else time + step.size
                y, slope = trial.after, trial.last
            else:
                watch.reject(time, y, step.size)
                size, slope = longest, trial.first


def _fixed(
    taken: Steps, y: Tensor, times: Sequence[float], solver: Solver, watch: Watch
) -> Iterator[tuple[Step, Tensor, bool]]:
    points = grid(times, step_size(solver, times))
    ends = set(times)
    for time, end in pairwise(points):
        watch.step(time, y, abs(end - time))
        step = Step(time, end - time)
        y = taken.step(step, y)
        yield step, y, end in ends


def walk_back(
    taken: Steps,
    path: Path,
    gradient: Tensor,
    parameters: Sequence[Tensor],
    solver: Solver,
    watch: Watch,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Differentiate a walk, recomputing one step at a time from its end.

    Args:
        taken: the steps of the walk.
        path: the way that was walked.
        gradient: of the solution, ``(times, size)``.
        parameters: what else to differentiate by.
        solver: as in ``walk``.
        watch: checks every step.

    Returns:
        The gradients of the initial state and of the parameters (None for one that is not used).
    """
    arriving = dict(zip(path.arrivals, gradient, strict=True))
    adjoint = torch.zeros_like(gradient[0])
    sums: Sequence[Tensor | None] = []
    index = len(path.steps)
    for state in _states_backwards(taken, path, solver.checkpoints):
        if index in arriving:
            adjoint = adjoint + arriving[index]
        index -= 1
        step = path.steps[index]
        watch.step(step.time, (state, adjoint), abs(step.size))
        adjoint, terms = taken.pull(step, state, adjoint, parameters)
        sums = [*map(_sum, sums, terms)] if sums else terms
    return adjoint + arriving[0], taken.gradients(sums, parameters)


def _sum(known: Tensor | None, term: Tensor | None) -> Tensor | None:
    return known if term is None else term if known is None else known + term


def _states_backwards(taken: Steps, path: Path, checkpoints: int | None) -> Iterator[Tensor]:
    kept, end = dict(path.kept), len(path.steps)
    for start in sorted(kept, reverse=True):
        room = end if checkpoints is None else max(0, checkpoints - len(kept))
        yield from _segment_backwards(taken, path.steps[start:end], kept.pop(start), room)
        end = start


def _segment_backwards(
    taken: Steps, steps: Sequence[Step], y: Tensor, room: int
) -> Iterator[Tensor]:
    """The states before each step, the last one first, holding at most ``room`` besides ``y``."""
    if len(steps) == 1:
        yield y
        return
    if room == 0:
        for start in reversed(range(len(steps))):
            yield _replay(taken, steps[:start], y)
        return
    # room that does not hold all of them is shared by snapshots and by what lies between two
    count = len(steps) - 1 if room >= len(steps) - 1 else max(1, room // 2)
    width = math.ceil(len(steps) / (count + 1))
    starts = range(0, len(steps), width)
    snapshots = [y]
    for start in starts[:-1]:
        snapshots.append(_replay(taken, steps[start : start + width], snapshots[-1]))
    for start in reversed(starts):
        held = len(snapshots) - 1
        piece = steps[start : start + width]
        yield from _segment_backwards(taken, piece, snapshots.pop(), room - held)


def _replay(taken: Steps, steps: Sequence[Step], y: Tensor) -> Tensor:
    for step in steps:
        y = taken.step(step, y)
    return y


def step_size(solver: Solver, times: Sequence[float]) -> float:
    """The step of a fixed grid over ``times``."""
    return solver.step_size or abs(times[-1] - times[0]) / DEFAULT_STEPS
