"""Runge-Kutta steps that ``torch.compile`` turns into one piece of code each.

Around small networks most of a step's time goes to starting its few hundred operations. The
functions here hold a whole step: the stages, what they add to the state, and the error's norm; or,
where nothing is kept of the way, all steps of it. They see the state in parts, because a flat
vector's length says nothing of how it may vary: with parts the batch stays a variable of the
compiled code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cnf import compiling
from cnf.ode.errors import CompilationError
from cnf.ode.guard import HUGE, Rhs, State, Velocity, cut, join
from cnf.ode.quadrature import PLACES, increment, increment_error
from cnf.ode.runge_kutta import Step, Tableau, Trial, first_guess, first_size
from cnf.ode.solver import ADAPTIVE, Solver
from cnf.ode.stepper import GROW, SAFETY, SHRINK, SLACK

T = TypeVar("T")

# how many different specs a process compiles
VARIANTS = 64
# backends that are known to follow torch.while_loop
LOOPING = ("inductor", "eager", "aot_eager")


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


class CompiledSteps:
    """Steps as compiled code; what ``PlainSteps`` does operation by operation.

    Args:
        spec: what is compiled.
        shapes: of the parts of the state.
        solver: with the tolerances and the compiler.
        velocity: checks what compiled code has no place to check, and counts evaluations.
    """

    def __init__(
        self,
        spec: Spec,
        shapes: Sequence[torch.Size],
        solver: Solver,
        velocity: Velocity,
    ):
        self.spec = spec
        self.shapes = shapes
        self.sizes = [shape.numel() for shape in shapes]
        self.tolerances = solver.rtol, solver.atol
        self.solver = solver
        self.code = code(solver.backend, solver.mode)
        self.velocity = velocity
        self.watch = velocity.watch

    def begin(self, time: float, y: Tensor, sign: float) -> tuple[Tensor, float]:
        """The derivative at the start, and the size of a first step."""
        numbers = self._numbers(y, time, sign)
        look = self._look(time, y)
        slope, size = self.code.begin(look, self.spec, numbers, self._parts(y))
        self.watch.nfe += 2
        return slope, float(size)

    def trial(self, step: Step, y: Tensor, slope: Tensor | None) -> Trial:
        """A step and its error."""
        slopes = None if slope is None else self._parts(slope)
        numbers = self._numbers(y, *step)
        look = self._look(step.time, y)
        trial = self.code.trial(look, self.spec, numbers, self._parts(y), slopes)
        self.watch.nfe += self.spec.evaluations + (slope is None)
        self.watch.velocity = trial[1] if trial[2] is None else trial[2]
        return Trial(*trial)

    def step(self, step: Step, y: Tensor) -> Tensor:
        """The state at the end of a step."""
        self.watch.nfe += self.spec.recomputed
        numbers = self._numbers(y, *step)
        return self.code.step(self._look(step.time, y), self.spec, numbers, self._parts(y))

    def pull(
        self, step: Step, y: Tensor, adjoint: Tensor, tracked: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The products of the adjoint at a step's end and its derivatives."""
        self.watch.nfe += self.spec.recomputed
        numbers = self._numbers(y, *step)
        # here, because not every compiler follows ``requires_grad_``
        state = tuple(part.detach().requires_grad_() for part in self._parts(y))
        adjoints = self._parts(adjoint)
        look = self._look(step.time, y)
        return self.code.pull(look, self.spec, numbers, state, adjoints, tuple(tracked))

    def loops(self, y: Tensor, points: Sequence[float]) -> bool:
        """Whether all steps between two times can be one piece of code.

        On a GPU each step is waited for anyhow, and is a graph of its own under some modes.
        """
        return (
            self.code.loops
            and len(points) == 2
            and y.device.type == "cpu"
            and self.solver.method in ADAPTIVE
            and self.spec.table.reuses_last
            and not self.solver.options
            and _known_as(self.spec.rhs) not in self.code.refused
        )

    def arrive(self, y: Tensor, points: Sequence[float]) -> Tensor | None:
        """The state at the end of the way between two times.

        None where a step fails, which one that is walked tells of, or where the loop does not
        compile, which is not tried again.
        """
        watch = self.watch
        limits = watch.smallest(max(map(abs, points))), float(self.solver.max_steps)
        numbers = torch.tensor([*points, *self.tolerances, *limits], dtype=torch.float64)
        look = self._look(points[0], y)
        try:
            end, found = self.code.arrive(look, self.spec, numbers, self._parts(y))
        except CompilationError:
            self.code.refused.add(_known_as(self.spec.rhs))
            return None
        time, accepted, rejected = found.tolist()
        if time != points[-1]:
            return None
        watch.accepted, watch.rejected = int(accepted), int(rejected)
        watch.nfe += 2 + self.spec.evaluations * (watch.accepted + watch.rejected)
        return end

    def _numbers(self, y: Tensor, time: float, size: float) -> Tensor:
        # as one tensor: code that was compiled for one number would be compiled again for the next
        numbers = [time, size, *self.tolerances]
        if y.device.type != "cuda":
            return torch.tensor(numbers, dtype=y.dtype, device=y.device)
        # from pinned memory, because any other copy waits until the device has done all it has
        pinned = torch.tensor(numbers, dtype=y.dtype, pin_memory=True)
        return pinned.to(y.device, non_blocking=True)

    def _parts(self, flat: Tensor) -> State:
        return cut(flat, self.sizes, self.shapes)

    def _look(self, time: float, y: Tensor) -> Callable[[], None]:
        return functools.partial(self.velocity.look, time, y)


class Code(NamedTuple):
    """The functions below, compiled; the first argument of each looks at the velocity."""

    begin: Callable[..., tuple[Tensor, Tensor]]
    trial: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]
    step: Callable[..., Tensor]
    pull: Callable[..., tuple[Tensor, Sequence[Tensor]]]
    arrive: Callable[..., tuple[Tensor, Tensor]]
    # whether ``arrive`` is for use: uncompiled, or by another backend, torch's loop is not
    loops: bool
    # right-hand sides with steps that do not compile as a loop
    refused: set[object]


def _known_as(rhs: Rhs) -> object:
    # a function that is made anew for every solve has the same code
    return getattr(rhs, "__code__", rhs)


def settings() -> contextlib.AbstractContextManager[None]:
    """What the compiler is to be told around many steps."""
    return compiling.settings(constants=True)


@functools.cache
def code(backend: str, mode: str | None = None) -> Code:
    """The functions below, compiled once for all specs that look alike to a compiler.

    Compiled code cannot check the velocity. What they take as their first argument does: it is
    called where something was compiled, and what passes then passes whenever that code is used.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import
    from torch._dynamo.utils import counters

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    def one(function: Callable[..., T], native: bool = False) -> Callable[..., T]:
        run = compiling.compiled(
            function,
            backend=backend,
            mode=mode,
            dynamic=True,
            whole=True,
            # a method's coefficients, handed in as variables, cost as much as a small net
            constants=True,
            variants=VARIANTS,
            native=native,
        )

        @functools.wraps(function)
        def checked(look: Callable[[], None], *arguments: object) -> T:
            before = graphs()
            try:
                result = run(*arguments)
                if run is function or graphs() != before:
                    look()
                return result
            except BaseException as error:
                if graphs() != before:
                    # nobody may come across code that has not passed
                    torch.compiler.reset()
                if not isinstance(error, TorchDynamoException):
                    raise
                look()  # what is wrong with the velocity has a better name
                raise CompilationError(str(error)) from error

        return checked

    known = backend in LOOPING and hasattr(torch, "while_loop")
    loops = known and (backend != "inductor" or compiling.has_compiler())
    return Code(
        one(begin), one(trial), one(step), one(pull), one(arrive, native=True), loops, set()
    )


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


def pull(
    spec: Spec, numbers: Tensor, state: State, adjoints: State, tracked: State
) -> tuple[Tensor, Sequence[Tensor]]:
    """The products of the adjoint at a step's end and its derivatives; zero for what is unused.

    All of the state requires grad.
    """
    time, size, _, _ = numbers.unbind()
    with torch.enable_grad():
        after = _stages(spec, time, size, state, None)[0]
        found = torch.autograd.grad(
            after, (*state, *tracked), adjoints, materialize_grads=True, allow_unused=True
        )
    return join(found[: len(state)]), found[len(state) :]


def arrive(spec: Spec, numbers: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """All steps from one time to another, as ``stepper`` takes them.

    Returns:
        The state, flat, and the time that it came to with the counts of accepted and rejected
        steps: short of the other time where there were too many, or one became too small.
    """
    # copies, because what a loop looks at must not share memory
    start, end, rtol, atol, smallest, most = [number.clone() for number in numbers.unbind()]
    dtype, count, order = state[0].dtype, len(state), spec.table.order
    ahead = torch.stack([start, (end - start).sign(), rtol, atol]).to(dtype)
    slopes, size = _begin(spec, ahead, state)

    def going(time: Tensor, size: Tensor, accepted: Tensor, rejected: Tensor, *_: Tensor) -> Tensor:
        return (time != end) & (size > smallest) & (accepted + rejected < most)

    def attempt(
        time: Tensor, size: Tensor, accepted: Tensor, rejected: Tensor, *parts: Tensor
    ) -> State:
        before, first = parts[:count], parts[count:]
        left = end - time
        pieces = (left.abs() / size - SLACK).ceil().clamp_min(1.0)
        step = left / pieces
        tried = torch.stack([time, step, rtol, atol]).to(dtype)
        after, _, last, ratio = _trial(spec, tried, before, first)
        factor = (SAFETY * ratio.double() ** (-1 / order)).clamp(SHRINK, GROW)
        longest = step.abs() * factor
        good, lands = ratio <= 1, pieces == 1
        then = torch.where(lands, end, time + step)
        return (
            torch.where(good, then, time),
            torch.where(good & lands, torch.maximum(size, longest), longest),
            accepted + good,
            rejected + ~good,
            *[
                torch.where(good, new, old).contiguous()
                for new, old in zip((*after, *last), parts, strict=True)
            ],
        )

    none = torch.zeros_like(start)
    moving = [part.clone(memory_format=torch.contiguous_format) for part in (*state, *slopes)]
    time, _, accepted, rejected, *parts = torch.while_loop(
        going, attempt, (start.clone(), size, none, none.clone(), *moving)
    )
    return join(parts[:count]), torch.stack([time, accepted, rejected])


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
    for i in range(1, table.used):
        at = _combine(proper, size, table.stages[i], stages)
        stages.append((spec.alone or spec.rhs)(time + table.nodes[i] * size, at))
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
    norms = []
    for kind, part, scale in zip(kinds, parts, scales, strict=True):
        if kind is not None and part.numel():
            ratio = (part / scale).abs()
            norms.append(ratio.amax() if kind == "sample" else ratio.square().mean().sqrt())
    return torch.stack(norms).amax().nan_to_num(nan=HUGE, posinf=HUGE)
