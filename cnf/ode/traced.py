"""The code of Runge-Kutta steps that is compiled, one piece each.

The functions here hold a whole step: the stages, what they add to the state, and the error's norm;
or all steps of a way, or of the way back along it. They see the state in parts, because a flat
vector's length says nothing of how it may vary: with parts the batch stays a variable of the
compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.guard import HUGE, Rhs, State, Swap, join
from cnf.ode.quadrature import PLACES, increment, increment_error
from cnf.ode.runge_kutta import Tableau, first_guess, first_size
from cnf.ode.stepper import GROW, SAFETY, SHRINK, SLACK


class Spec(NamedTuple):
    """What is compiled into the code of a step.

    Attributes:
        rhs: the right-hand side, from a time and the proper state to the derivatives of all parts.
        proper: how many parts the right-hand side sees; the others are integrals.
        norms: how each part's error is measured, "batch" or "sample"; None where it is not.
        table: the method.
        alone: the derivatives of the proper state, where integrals go by quadrature; else None.
        inner: how stages make the state at the places of the quadrature.
    """

    rhs: Rhs
    proper: int
    norms: tuple[str | None, ...]
    table: Tableau
    alone: Rhs | None = None
    inner: tuple[tuple[float, ...], ...] = ()

    @property
    def steering(self) -> tuple[str | None, ...]:
        """The norms as the size of the first step takes them, of integrals only from the state."""
        if self.alone is None:
            return self.norms
        return tuple(kind if i < self.proper else None for i, kind in enumerate(self.norms))

    @property
    def evaluations(self) -> int:
        """How often a trial evaluates the velocity, but for its first stage."""
        return len(self.table.nodes) - 1 + len(self.inner)

    @property
    def recomputed(self) -> int:
        """How often the state at a step's end needs it."""
        return 1 + self.evaluations if self.alone else self.table.used


def begin(spec: Spec, numbers: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """The derivative at the start, flat, and the size of a first step."""
    slopes, size = _begin(spec, numbers, state)
    return join(slopes), size


def trial(
    spec: Spec, numbers: Tensor, state: State, slopes: State | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The numbers of a ``Trial``."""
    after, first, last, ratio = _trial(spec, numbers, state, slopes)
    return join(after), join(first), join(last) if spec.table.reuses_last else None, ratio


def step(spec: Spec, numbers: Tensor, state: State) -> Tensor:
    """The state at the end of a step, flat."""
    time, size, _, _ = numbers.unbind()
    return join(_stages(spec, time, size, state, None)[0])


def pull(spec: Spec, numbers: Tensor, state: State, adjoints: State, tracked: State) -> Tensor:
    """The products of the adjoint at a step's end and its derivatives; zero for what is unused.

    All of the state requires grad. Flat, the state's and then those of ``tracked``, which takes
    fewer operations around this code.
    """
    time, size, _, _ = numbers.unbind()
    with torch.enable_grad():
        after = _stages(spec, time, size, state, None)[0]
        found = torch.autograd.grad(
            after, (*state, *tracked), adjoints, materialize_grads=True, allow_unused=True
        )
    return join(found)


def arrive(
    spec: Spec, numbers: Tensor, state: State, slopes: State | None, room: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps from one time to another, as ``stepper`` takes them.

    Args:
        spec: what is compiled.
        numbers: the two times, rtol, atol, the smallest size of a step, how many there may be, and
            the size to begin with, in float64.
        state: at the first time.
        slopes: the derivatives there; None has them and the first size computed.
        room: memory for the states before each step, ``(steps, size)``; the way ends where it is
            full. With no rows, nothing is kept.

    Returns:
        The state and its derivatives, flat; the time that it came to, the next size, and how many
        steps were accepted and rejected; ``room``, filled; the time and the size of each step. It
        is short of the other time if there was no more room, there were too many steps, or one
        became too small.
    """
    # copies, because what a loop looks at must not share memory
    start, end, rtol, atol, smallest, most, size = [number.clone() for number in numbers.unbind()]
    dtype, count = state[0].dtype, len(state)
    if slopes is None:
        ahead = torch.stack([start, (end - start).sign(), rtol, atol]).to(dtype)
        slopes, size = _begin(spec, ahead, state)
    passed = numbers.new_zeros(len(room), 2)
    keeps = len(room) > 0

    def going(time: Tensor, size: Tensor, accepted: Tensor, rejected: Tensor, *_: Tensor) -> Tensor:
        more = _going((time, size, accepted, rejected), end, smallest, most)
        return more & (accepted < len(room)) if keeps else more

    def body(
        time: Tensor, size: Tensor, accepted: Tensor, rejected: Tensor, *moving: Tensor
    ) -> State:
        parts, records = moving[: 2 * count], moving[2 * count :]
        found = time, size, accepted, rejected
        then, taken, moved = _attempt(spec, found, (end, rtol, atol), parts)
        if keeps:
            # where it is rejected, the next step's take its place
            rows = join(parts[:count]), torch.stack(taken)
            at = accepted.long().reshape(1)
            records = tuple(
                record.index_copy(0, at, row.unsqueeze(0))
                for record, row in zip(records, rows, strict=True)
            )
        return *then, *[part.contiguous() for part in moved], *records

    none = torch.zeros_like(start)
    moving = [_own(part) for part in (*state, *slopes, *([room, passed] if keeps else []))]
    time, size, accepted, rejected, *rest = torch.while_loop(
        going, body, (start.clone(), size, none, none.clone(), *moving)
    )
    after, last, records = rest[:count], rest[count : 2 * count], rest[2 * count :]
    found = torch.stack([time, size, accepted, rejected])
    room, passed = records or (room, passed)
    return join(after), join(last), found, room, passed


def attempt(
    spec: Spec, numbers: Tensor, found: Tensor, state: State, slopes: State
) -> tuple[Tensor, Tensor, Tensor]:
    """One attempt at a step of ``arrive``; where it has ended, it leaves all as it is.

    So attempts may be started before anybody knows what came of those before.

    Args:
        spec: what is compiled.
        numbers: the time to arrive at, rtol, atol, the smallest size of a step, and how many there
            may be, in float64.
        found: the time, the size of the next step, and how many were accepted and rejected, in
            float64; the time and the size of the step before, which are not looked at.
        state: at that time.
        slopes: the derivatives there.

    Returns:
        The state and its derivatives, flat, and ``found`` after the attempt.
    """
    end, rtol, atol, smallest, most = numbers.unbind()
    known, parts = found[:4].unbind(), (*state, *slopes)
    going = _going(known, end, smallest, most)
    then, taken, moved = _attempt(spec, known, (end, rtol, atol), parts)
    after = [torch.where(going, new, old) for new, old in zip(moved, parts, strict=True)]
    counts = [torch.where(going, new, old) for new, old in zip(then, known, strict=True)]
    count = len(state)
    return join(after[:count]), join(after[count:]), torch.stack([*counts, *taken])


def retrace(
    spec: Spec, swap: Swap, passed: Tensor, kept: State, adjoints: State, tracked: State
) -> Tensor:
    """The way back along steps, as ``stepper.walk_back`` goes.

    Args:
        spec: what is compiled.
        swap: gives its right-hand sides with other tensors in place of ``tracked``.
        passed: the time and the size of each step, ``(steps, 2)``, in float64.
        kept: the parts of the state before each, ``(steps, *shape)``, each in memory of its own.
        adjoints: of the parts at the end.
        tracked: what else to differentiate by.

    Returns:
        The gradients of the state at the start and then of ``tracked``, flat.
    """
    count, dtype = len(kept), kept[0].dtype

    def going(index: Tensor, *_: Tensor) -> Tensor:
        return index >= 0

    def pulled(index: Tensor, *moving: Tensor) -> State:
        at = index.reshape(1)
        time, size = passed.index_select(0, at).squeeze(0).to(dtype).unbind()

        def after(state: State, numbers: State) -> State:
            rhs, alone = swap(numbers)
            proper = None if spec.alone is None else alone
            # not by ``_replace``, whose number of fields a compiler takes for one that may vary
            swapped = Spec(rhs, spec.proper, spec.norms, spec.table, proper, spec.inner)
            return _stages(swapped, time, size, state, None)[0]

        state = tuple(part.index_select(0, at).squeeze(0) for part in kept)
        _, pull = torch.func.vjp(after, state, tracked)  # type: ignore[misc]
        grads, terms = pull(moving[:count])
        sums = [total + term for total, term in zip(moving[count:], terms, strict=True)]
        return index - 1, *map(_own, grads), *sums

    last = torch.full((), len(passed) - 1, dtype=torch.int64)
    nothing = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in tracked]
    _, *found = torch.while_loop(going, pulled, (last, *map(_own, adjoints), *nothing))
    return join(found)


def _own(part: Tensor) -> Tensor:
    """The numbers in memory of their own, as what goes round in loops has to lie."""
    return part.clone(memory_format=torch.contiguous_format)


def _going(found: State, end: Tensor, smallest: Tensor, most: Tensor) -> Tensor:
    """Whether a way has neither arrived nor failed."""
    time, size, accepted, rejected = found
    return (time != end) & (size > smallest) & (accepted + rejected < most)


def _attempt(spec: Spec, found: State, limits: State, parts: State) -> tuple[State, State, State]:
    """What an attempt at a step makes of all that changes on a way.

    Args:
        spec: what is compiled.
        found: the time, the size of the next step, and how many were accepted and rejected.
        limits: the time to arrive at, rtol and atol.
        parts: of the state and of its derivatives.

    Returns:
        The next ``found``, the time and the size of the step that was tried, the next ``parts``.
    """
    time, size, accepted, rejected = found
    end, rtol, atol = limits
    count = len(parts) // 2
    before, first = parts[:count], parts[count:]
    left = end - time
    pieces = (left.abs() / size - SLACK).ceil().clamp_min(1.0)
    step = left / pieces
    tried = torch.stack([time, step, rtol, atol]).to(before[0].dtype)
    after, _, last, ratio = _trial(spec, tried, before, first)
    factor = (SAFETY * ratio.double() ** (-1 / spec.table.order)).clamp(SHRINK, GROW)
    longest = step.abs() * factor
    good, lands = ratio <= 1, pieces == 1
    then = (
        torch.where(good, torch.where(lands, end, time + step), time),
        torch.where(good & lands, torch.maximum(size, longest), longest),
        accepted + good,
        rejected + ~good,
    )
    moved = [torch.where(good, new, old) for new, old in zip((*after, *last), parts, strict=True)]
    return then, (time, step), tuple(moved)


def _begin(spec: Spec, numbers: Tensor, state: State) -> tuple[State, Tensor]:
    """The derivative at the start, and the size of a first step."""
    time, sign, rtol, atol = numbers.unbind()
    proper = state[: spec.proper]
    slopes = spec.rhs(time, proper)
    scales = [atol + rtol * part.abs() for part in state]
    norms = spec.steering
    change = _norm(norms, slopes, scales)
    guess = first_guess(_norm(norms, state, scales), change)
    move = (sign * guess).to(numbers)
    ahead = spec.rhs(
        time + move, tuple(part + move * slope for part, slope in zip(proper, slopes, strict=False))
    )
    bends = [after - before for after, before in zip(ahead, slopes, strict=True)]
    bend = _norm(norms, bends, scales)
    return slopes, first_size(guess, change, bend, spec.table.order)


def _trial(
    spec: Spec, numbers: Tensor, state: State, slopes: State | None
) -> tuple[State, State, State, Tensor]:
    """What a ``Trial`` holds, in parts; without a slope at the end that of the last stage."""
    time, size, rtol, atol = numbers.unbind()
    table = spec.table
    after, stages, integrands = _stages(spec, time, size, state, slopes)
    if table.reuses_last and spec.alone is None:
        stages.append(spec.rhs(time + size, after[: spec.proper]))
    zeros = [torch.zeros_like(slope) for slope in stages[0]]
    errors = [
        *_combine(zeros, size, table.error, stages),
        *[increment_error(size, values) for values in zip(*integrands, strict=True)],
    ]
    scales = [
        atol + rtol * torch.maximum(before.abs(), then.abs())
        for before, then in zip(state, after, strict=True)
    ]
    ends: Sequence[State] = stages
    if integrands:
        ends = [(*stages[i], *integrands[i]) for i in (0, -1)]
    return after, ends[0], ends[-1], _norm(spec.norms, errors, scales)


def _stages(
    spec: Spec, time: Tensor, size: Tensor, state: State, slopes: State | None
) -> tuple[State, list[State], list[State]]:
    """The state at a step's end, its stages, and integrands where integrals go by quadrature."""
    table, proper = spec.table, state[: spec.proper]
    start = spec.rhs(time, proper) if slopes is None else slopes
    stages = [start if spec.alone is None else start[: spec.proper]]
    alone = spec.rhs if spec.alone is None else spec.alone
    for i in range(1, table.used):
        at = _combine(proper, size, table.stages[i], stages)
        stages.append(alone(time + table.nodes[i] * size, at))
    if spec.alone is None:
        return _combine(state, size, table.weights, stages), stages, []
    moved = _combine(proper, size, table.weights, stages)
    end = spec.rhs(time + size, moved)
    stages.append(end[: spec.proper])
    inside = [
        spec.rhs(time + place * size, _combine(proper, size, row, stages))
        for place, row in zip(PLACES, spec.inner, strict=True)
    ]
    integrands = [parts[spec.proper :] for parts in (start, *inside, end)]
    grown = [
        part + increment(size, values)
        for part, *values in zip(state[spec.proper :], *integrands, strict=True)
    ]
    return (*moved, *grown), stages, integrands


def _combine(
    state: Sequence[Tensor], size: Tensor, weights: Sequence[float], stages: Sequence[State]
) -> State:
    """Y + h Σ wᵢ kᵢ of each part."""
    used = [(weight, stage) for weight, stage in zip(weights, stages, strict=False) if weight]
    return tuple(
        part + size * sum(weight * stage[i] for weight, stage in used)
        for i, part in enumerate(state)
    )


def _norm(kinds: Sequence[str | None], parts: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """The norm of ``error_norm``, of parts over their scales."""
    norms = [
        _measured(kind, (part / scale).abs())
        for kind, part, scale in zip(kinds, parts, scales, strict=True)
        if kind is not None and part.numel()
    ]
    return torch.stack(norms).amax().nan_to_num(nan=HUGE, posinf=HUGE)


def _measured(kind: str, ratio: Tensor) -> Tensor:
    if kind == "sample":
        return ratio.amax()
    # in float64, because Inductor's code for a long sum of float32 is not that for a short one: it
    # would compile a whole way again for a larger batch
    return ratio.square().mean(dtype=torch.float64).sqrt().to(ratio.dtype)
