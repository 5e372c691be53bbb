"""Runge-Kutta steps that ``torch.compile`` turns into pieces of code (``traced``), and their use.

Around small networks most of a step's time goes to starting its few hundred operations. Here they
are one piece of code, and on a CPU all steps of a way are, and all of the way back.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cnf import compiling
from cnf.ode import stepper, traced, transfer
from cnf.ode.errors import CompilationError, SolverWarning
from cnf.ode.guard import State, Velocity, Watch, cut, finite
from cnf.ode.runge_kutta import Step, Steps, Trial
from cnf.ode.solver import ADAPTIVE, Solver
from cnf.ode.stepper import Path
from cnf.ode.traced import Spec
from cnf.ode.transfer import Answer, send

T = TypeVar("T")

# backends that are known to follow torch.while_loop
LOOPING = ("inductor", "eager", "aot_eager")
# how many states a loop has room to keep; where it runs out another one begins
ROOM = 64
# numbers in a state beyond which that room would be large, and starting operations takes no time
LARGE = 1 << 17
# how many attempts at steps may be under way on a device: while one is computed, Python starts the
# next
AHEAD = 2


class CompiledSteps:
    """Steps as compiled code; what ``PlainSteps`` does operation by operation.

    Args:
        spec: what is compiled.
        shapes: of the parts of the state.
        solver: with the tolerances and the compiler.
        velocity: checks what compiled code has no place to check, and counts evaluations.
        looped: what is compiled into loops, the same in other operations; None makes no loops.
    """

    def __init__(
        self,
        spec: Spec,
        shapes: Sequence[torch.Size],
        solver: Solver,
        velocity: Velocity,
        looped: Spec | None,
    ):
        self.spec, self.looped = spec, looped
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
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The products of the adjoint at a step's end and its derivatives, by ``tracked`` flat."""
        self.watch.nfe += self.spec.recomputed
        numbers = self._numbers(y, *step)
        # here, because not every compiler follows ``requires_grad_``
        state = tuple(part.detach().requires_grad_() for part in self._parts(y))
        adjoints = self._parts(adjoint)
        look = self._look(step.time, y)
        found = self.code.pull(look, self.spec, numbers, state, adjoints, tuple(tracked))
        return found[: len(y)].to(y.dtype), [found[len(y) :]]

    def gradients(
        self, sums: Sequence[Tensor | None], tracked: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The gradients of ``tracked`` in a sum of flat ones."""
        sizes, shapes = [tensor.numel() for tensor in tracked], [tensor.shape for tensor in tracked]
        pieces = [piece for flat in sums if flat is not None for piece in cut(flat, sizes, shapes)]
        return [piece.to(tensor.dtype) for piece, tensor in zip(pieces, tracked, strict=True)]

    def loops(self, y: Tensor, points: Sequence[float], keep: bool) -> bool:
        """Whether all steps between two times can be one piece of code.

        Not on a GPU, where the code of a loop waits for the device in every turn. States are kept
        in a loop if all of them are, and not where they are large.
        """
        return (
            self._may_loop("arrive", y, points)
            and self._goes_on(keep)
            and not (keep and len(y) > LARGE)
        )

    def ahead(self, y: Tensor, points: Sequence[float], keep: bool) -> bool:
        """Whether attempts at steps may be started before it is known what came of others.

        That is for devices that compute while Python goes on.
        """
        return transfer.far(y) and len(points) == 2 and self._goes_on(keep)

    def loops_back(self, path: Path) -> bool:
        """Whether the way back along a path can be one piece of code, whatever the method."""
        return (
            self._may_loop("retrace", path.solution, path.arrivals)
            and self.velocity.swap is not None
            and len(path.kept) == len(path.steps) > 1
            and path.solution.shape[1] <= LARGE
        )

    def arrive(self, y: Tensor, points: Sequence[float], keep: bool) -> Path | None:
        """The way between two times.

        None where a step fails, which one that is walked tells of, or where the loop does not
        compile, which is not tried again.
        """
        watch, (time, end) = self.watch, points
        most = self.solver.max_steps - watch.accepted - watch.rejected
        smallest = watch.smallest(max(map(abs, points)))
        room = y.new_empty(ROOM if keep else 0, len(y))
        torch._dynamo.mark_static(room, 0)
        steps: list[Step] = []
        kept: list[Tensor] = []
        after, slopes, size, good, bad = y, None, 0.0, 0, 0
        while time != end:
            limits = smallest, float(most - good - bad)
            numbers = torch.tensor(
                [time, end, *self.tolerances, *limits, size], dtype=torch.float64
            )
            look = self._look(time, after, looped=True)
            try:
                after, slope, found, states, passed = self.code.arrive(
                    look, self.looped, numbers, self._apart(after), slopes, room
                )
            except CompilationError as error:
                self._refuse("arrive", error)
                return None
            time, size, accepted, rejected = found.tolist()
            if time != end and not (keep and accepted == ROOM):
                return None
            count = int(accepted)
            good, bad, slopes = good + count, bad + int(rejected), self._apart(slope)
            if keep:
                kept += states[:count].clone().unbind()
                steps += [Step(*row) for row in passed[:count].tolist()]
        watch.accepted += good
        watch.rejected += bad
        watch.nfe += 2 + self.spec.evaluations * (good + bad)
        return Path(torch.stack([y, after]), steps, [0, len(steps)], dict(enumerate(kept)))

    def arrive_ahead(self, y: Tensor, points: Sequence[float], keep: bool) -> Path | None:
        """``arrive``, with attempts at steps started ahead; None where a step fails.

        No more of them are under way than the way will take by the last that is known.
        """
        watch, (time, end) = self.watch, points
        most = self.solver.max_steps - watch.accepted - watch.rejected
        smallest = watch.smallest(max(map(abs, points)))
        limits = send([end, *self.tolerances, smallest, most], torch.float64, y.device)
        here, none = send([time, 0.0], torch.float64, y.device)
        sign = 1.0 if end > time else -1.0
        look = self._look(time, y)
        slope, size = self.code.begin(look, self.spec, self._numbers(y, time, sign), self._parts(y))
        found = torch.stack([here, size, none, none, here, none])
        steps: list[Step] = []
        kept: list[Tensor] = []
        under_way: collections.deque[tuple[Answer, Tensor, Tensor]] = collections.deque()
        after, missing, started = y, AHEAD, 0
        while True:
            while len(under_way) < min(missing, AHEAD):
                before = after
                after, slope, found = self.code.attempt(
                    look, self.spec, limits, found, self._parts(before), self._parts(slope)
                )
                started += 1
                under_way.append((Answer(found), before, after))
            answer, before, state = under_way.popleft()
            time, length, accepted, rejected, *step = answer.read()
            if accepted > len(steps):
                steps.append(Step(*step))
                if keep:
                    kept.append(before)
            if time == end:
                break
            if not length > smallest or accepted + rejected >= most:
                return None
            missing = stepper.steps_between(time, end, length)
        watch.accepted += len(steps)
        watch.rejected += int(rejected)
        watch.nfe += 2 + self.spec.evaluations * started
        return Path(torch.stack([y, state]), steps, [0, len(steps)], dict(enumerate(kept)))

    def retrace(
        self, path: Path, gradient: Tensor, tracked: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]] | None:
        """The gradients of the initial state and of ``tracked``, by the way back along a path.

        None where they are not finite, which steps that are walked tell of, or where the loop does
        not compile.
        """
        watch, count = self.watch, len(path.steps)
        kept = torch.stack([path.kept[index] for index in range(count)])
        states = tuple(part.contiguous() for part in self._parts(kept))
        passed = torch.tensor(path.steps, dtype=torch.float64)
        torch._dynamo.mark_static(passed, 1)
        look = self._look(path.steps[0].time, kept[0], looped=True)
        adjoints = self._apart(gradient[1])
        try:
            found = self.code.retrace(
                look, self.looped, self.velocity.swap, passed, states, adjoints, tuple(tracked)
            )
        except CompilationError as error:
            self._refuse("retrace", error)
            return None
        if not finite(found):
            return None
        watch.nfe += self.spec.recomputed * count
        watch.accepted += count
        size = len(gradient[0])
        start = found[:size].to(gradient.dtype) + gradient[0]
        return start, self.gradients([found[size:]], tracked)

    def _goes_on(self, keep: bool) -> bool:
        """Whether steps are chosen as ``traced`` does it, and kept all or not at all."""
        solver = self.solver
        adaptive = solver.method in ADAPTIVE and self.spec.table.reuses_last
        return adaptive and not solver.options and not (keep and solver.checkpoints)

    def _may_loop(self, kind: str, y: Tensor, points: Sequence[float]) -> bool:
        near = not transfer.far(y) and len(points) == 2
        if self.looped is None or not near or not self.code.loops:
            return False
        refused = self.code.refused
        return not refused or (kind, _known_as(self.looped.rhs)) not in refused

    def _refuse(self, kind: str, error: CompilationError) -> None:
        if self.looped is not None:
            self.code.refused.add((kind, _known_as(self.looped.rhs)))
        reason = textwrap.shorten(error.reason, 400)  # some compilers go on for pages
        warnings.warn(
            "torch.compile cannot make one piece of code of all steps, so they are compiled one "
            f"by one, which is slower: {reason}",
            SolverWarning,
            stacklevel=2,
        )

    def _numbers(self, y: Tensor, time: float, size: float) -> Tensor:
        # as one tensor: code that was compiled for one number would be compiled again for the next
        return send([time, size, *self.tolerances], y.dtype, y.device)

    def _parts(self, flat: Tensor) -> State:
        return cut(flat, self.sizes, self.shapes)

    def _apart(self, flat: Tensor) -> State:
        """The parts, without places in memory that code would be told of at every call."""
        return tuple(part.clone() if part.storage_offset() else part for part in self._parts(flat))

    def _look(self, time: float, y: Tensor, looped: bool = False) -> Callable[[], None]:
        def look() -> None:
            self.velocity.look(time, y)
            if looped:
                self.velocity.look_swapped(time, y)

        return look


def travel(
    steps: Steps,
    plain: Callable[[], Steps],
    y: Tensor,
    points: Sequence[float],
    solver: Solver,
    watch: Watch,
    keep: bool = True,
) -> Path:
    """``stepper.walk``, in one piece of code where there is one, or with attempts ahead."""
    if isinstance(steps, CompiledSteps) and steps.loops(y, points, keep):
        path = steps.arrive(y, points, keep)
        if path is not None:
            return path
        if steps.loops(y, points, keep):
            # plain ones say what is wrong, with nothing to compile first
            steps = plain()
    elif isinstance(steps, CompiledSteps) and steps.ahead(y, points, keep):
        path = steps.arrive_ahead(y, points, keep)
        if path is not None:
            return path
        steps = plain()
    return stepper.walk(steps, y, points, solver, watch, keep)


def travel_back(
    steps: Steps,
    plain: Callable[[], Steps],
    path: Path,
    gradient: Tensor,
    tracked: Sequence[Tensor],
    solver: Solver,
    watch: Watch,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """``stepper.walk_back``, in one piece of code where there is one."""
    if isinstance(steps, CompiledSteps) and steps.loops_back(path):
        found = steps.retrace(path, gradient, tracked)
        if found is not None:
            return found
        if steps.loops_back(path):
            steps = plain()
    start, grads = stepper.walk_back(steps, path, gradient, tracked, solver, watch)
    known = [grad for grad in grads if grad is not None]
    watch.arrived([start, *known], path.steps[0].time, "the gradient is")
    return start, grads


class Code(NamedTuple):
    """The functions of ``traced``, compiled; the first argument of each looks at the velocity."""

    begin: Callable[..., tuple[Tensor, Tensor]]
    trial: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]]
    step: Callable[..., Tensor]
    pull: Callable[..., Tensor]
    attempt: Callable[..., tuple[Tensor, Tensor, Tensor]]
    arrive: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    retrace: Callable[..., Tensor]
    # whether the last two are for use: uncompiled, or by another backend, torch's loop is not
    loops: bool
    # right-hand sides with steps that do not compile as a loop
    refused: set[object]


def _known_as(value: object, depth: int = 4) -> object:
    """What a right-hand side is known as, which may be a function that is made for every solve.

    Its code is the same then, and so are the kinds of modules and the code that it calls.
    """
    if not inspect.isfunction(value):
        return type(value)
    around = [cell.cell_contents for cell in value.__closure__ or () if depth]
    called = [_known_as(content, depth - 1) for content in around if callable(content)]
    return value.__code__, *called


def settings() -> contextlib.AbstractContextManager[None]:
    """What the compiler is to be told around many steps."""
    return compiling.settings(constants=True)


@functools.cache
def code(backend: str, mode: str | None = None) -> Code:
    """The functions of ``traced``, compiled once for all specs that look alike to a compiler.

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
        one(traced.begin),
        one(traced.trial),
        one(traced.step),
        one(traced.pull),
        one(traced.attempt),
        one(traced.arrive, native=True),
        one(traced.retrace, native=True),
        loops,
        set(),
    )
