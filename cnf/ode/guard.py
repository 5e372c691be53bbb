"""The guard around the velocity: counts work, checks each step, and names what goes wrong.

torchdiffeq guards itself with ``assert``, which ``python -O`` removes, and its fixed-grid methods
not at all; its callbacks tell of every step, forward and backward, and the guard listens to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cnf.ode import transfer
from cnf.ode.errors import (
    CompilationError,
    NonFiniteState,
    SolverError,
    StepUnderflow,
    TooManySteps,
    UntrackedTensor,
)
from cnf.ode.recorder import Stats, current_recorders
from cnf.ode.solver import ADAPTIVE, SCIPY, Solver

State = tuple[Tensor, ...]
Rhs = Callable[[Tensor, State], State]
# the right-hand side, and the proper state's alone, with other tensors in place of its parameters
Swap = Callable[[Sequence[Tensor]], tuple[Rhs, Rhs]]
Norm = Callable[[Tensor], Tensor]

# stands for NaN and infinity in error norms: large enough to shrink a step as fast as the method
# allows, small enough that the first step, chosen from its square, does not vanish in float32
HUGE = 1e20


class Watch:
    """What is known of the pass that is under way: its work, and where it stands."""

    def __init__(self, solver: Solver, times: Sequence[float], resolution: float, name: str):
        self.solver = solver
        self.name = name
        self.sign = 1.0 if times[-1] > times[0] else -1.0
        self.span = abs(times[-1] - times[0])
        self.resolution = resolution
        self.recorders = current_recorders()
        self.velocity: Tensor | None = None
        self.stopped_at: tuple[float, Tensor | State] = (times[0], ())
        self.begin("forward", solver.method in ADAPTIVE, solver.method == SCIPY)

    def begin(self, direction: str, adaptive: bool, every_evaluation: bool = False) -> None:
        """Start to count a pass anew: one that chooses its steps, or tells nothing of them."""
        self.direction = direction
        self.adaptive = adaptive
        self.every_evaluation = every_evaluation
        self.nfe = self.accepted = self.rejected = self.undefined = 0
        self.settled = True
        self.pending: list[tuple[str, float, float | None, Tensor]] = []

    def finish(self) -> Stats:
        """End the pass: tell the recorders, let go of tensors."""
        stats = Stats(self.nfe, self.accepted, self.rejected)
        self.velocity = None
        self.stopped_at = (0.0, ())
        self.pending = []
        for recorder in self.recorders:
            recorder.report(stats.work(self.direction), self.name)
        return stats

    def evaluated(self, t: Tensor, velocity: Tensor) -> None:
        """Check one evaluation: only for methods that tell nothing of their steps."""
        if not finite(velocity):
            self.fail(NonFiniteState, "the velocity is not finite", float(t))
        if self.nfe > 10 * self.solver.max_steps:
            what = f"{SCIPY} used ten evaluations for each of max_steps={self.solver.max_steps}"
            self.fail(TooManySteps, what, float(t))

    def step(self, t0: Tensor | float, state: Tensor | State, dt: Tensor | float) -> None:
        """Check what a step starts from, before it is taken."""
        size, time = float(dt), float(t0)
        if self.settled:
            self._check_state(state, time, size)
        if self.adaptive:
            if time + size == time or (size < self.smallest(abs(time)) and not self.settled):
                self.stopped_at = (time, state)
                self._fail_at_limit(StepUnderflow, "the step became too small", time, size)
        else:
            self.accepted += 1
        if self.accepted + self.rejected >= self.solver.max_steps + (not self.adaptive):
            what = f"more than max_steps={self.solver.max_steps} steps"
            self._fail_at_limit(TooManySteps, what, time, size)

    def smallest(self, time: float) -> float:
        """The size below which a step at so late a time has become too small."""
        return self.solver.min_step or self.resolution * max(time, self.span / 1000)

    def starts(self, state: Tensor, time: float) -> None:
        """Check what a pass starts from; on a device, compiled ones look at it when they end."""
        what = "the initial state is"
        if self.solver.compile:
            self._check(state, what, time, None)
        else:
            self.arrived(state, time, what)

    def _check_state(self, state: Tensor | State, time: float, size: float) -> None:
        what = "the state is" if self.direction == "forward" else "the state or its gradient is"
        self._check(state, what, time, size)

    def _check(self, state: Tensor | State, what: str, time: float, size: float | None) -> None:
        parts = (state,) if isinstance(state, Tensor) else state
        if transfer.far(parts[0]):
            # read at the end, all at once
            self.pending.append((what, time, size, magnitude(parts)))
        elif not finite(parts):
            self.fail(NonFiniteState, f"{what} not finite", time, size)

    def _look_back(self) -> None:
        """Fail at the first state that is not finite, of those not looked at yet."""
        pending, self.pending = self.pending, []
        largest = torch.stack([value for *_, value in pending]).tolist() if pending else []
        for (what, time, size, _), value in zip(pending, largest, strict=True):
            if not math.isfinite(value):
                self.fail(NonFiniteState, f"{what} not finite", time, size)

    def step_back(self, t0: Tensor, state: State, dt: Tensor) -> None:
        """Check a step of torchdiffeq's adjoint, which counts time as the forward pass does."""
        self.step(self.sign * t0, state, dt)

    def accept(self, t0: Tensor | float, state: Tensor | State, dt: Tensor | float) -> None:
        """Count an accepted step; the state after it is checked when the next one starts."""
        self.accepted += 1
        self.settled = True

    def reject(self, t0: Tensor | float, state: Tensor | State, dt: Tensor | float) -> None:
        """Count a rejected step, and whether NaN was the reason."""
        self.rejected += 1
        self.undefined += self.velocity is not None and not finite(self.velocity)
        self.settled = False

    def arrived(self, tensors: Tensor | Iterable[Tensor], time: float, what: str) -> None:
        """Check what a pass ends with, and what it has not looked at on its way."""
        self._look_back()
        if not finite(tensors):
            self.fail(NonFiniteState, f"{what} not finite", time)

    def _fail_at_limit(self, kind: type[SolverError], what: str, time: float, step: float) -> None:
        self._look_back()
        # trial steps into where the velocity is not defined shrink as those do that are too long
        if self.velocity is not None and not finite(self.velocity):
            self.undefined += 1
        if 2 * self.undefined > self.rejected:
            what = "the velocity is" if self.direction == "forward" else "the gradient is"
            kind, what = NonFiniteState, f"{what} not finite"
        self.fail(kind, what, time, step)

    def fail(
        self,
        kind: type[SolverError],
        what: str,
        time: float,
        step: float | None = None,
    ) -> NoReturn:
        """Raise a named error that says where this pass stands."""
        if self.name:
            what = f"block {self.name!r}: {what}"
        raise kind(what, time, step, self.nfe, self.direction)


class Velocity:
    """The right-hand side on one flat vector, as torchdiffeq and the stepper call it.

    It carries the watch's callbacks under the names that torchdiffeq looks for, those that the
    methods of both passes support.
    """

    def __init__(
        self,
        rhs: Rhs,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        watch: Watch,
        tracked: Sequence[Tensor],
        integrals: int = 0,
        proper_rhs: Rhs | None = None,
        swap: Swap | None = None,
    ):
        self.rhs = rhs
        self.shapes = shapes
        self.sizes = [shape.numel() for shape in shapes]
        # the state without what is only integrated, which no velocity depends on
        self.proper = len(shapes) - integrals
        self.proper_rhs = proper_rhs or (lambda t, state: rhs(t, state)[: self.proper])
        self.swap = swap
        self.proper_size = sum(self.sizes[: self.proper])
        self.dtype = dtype
        self.watch = watch
        self.tracked = tracked
        self.unchecked = self.untraced = True
        solver = watch.solver
        for method, suffix in ((solver.method, ""), (solver.backward_method, "_adjoint")):
            told = {"callback_step": watch.step_back if suffix else watch.step}
            if method in ADAPTIVE:
                told |= {
                    "callback_accept_step": watch.accept,
                    "callback_reject_step": watch.reject,
                }
            for name, listener in ({} if method == SCIPY else told).items():
                setattr(self, name + suffix, listener)

    def __call__(self, t: Tensor, flat: Tensor) -> Tensor:
        """dy/dt of the whole state, ``(size,)``, from the whole state or its proper part."""
        parts = self.parts(t, self.split_proper(_plain(flat)[: self.proper_size]))
        velocity = join(parts)
        watch = self.watch
        watch.velocity = velocity
        if watch.every_evaluation:
            watch.evaluated(t, velocity)
        return velocity

    def alone(self, t: Tensor, flat: Tensor) -> Tensor:
        """dy/dt of the proper state, ``(proper_size,)``, from it alone."""
        self.watch.nfe += 1
        return join(self.proper_rhs(t, self.split_proper(_plain(flat))))

    def parts(self, t: Tensor, proper: State) -> State:
        """dy/dt of each part of the state, from the parts of the proper state."""
        self.watch.nfe += 1
        parts = self.rhs(t, proper)
        if self.unchecked:
            self._check_shapes(parts)
        if self.untraced and self.watch.direction == "backward":
            self._check_tracked([t, *proper, *self.tracked], parts)
        return parts

    def look(self, time: float, flat: Tensor) -> None:
        """Evaluate for the checks alone, which compiled code has no place for, if not done yet."""
        backward = self.watch.direction == "backward"
        if not self.unchecked and not (backward and self.untraced):
            return
        with torch.set_grad_enabled(backward):
            proper = flat[: self.proper_size].detach().requires_grad_(backward)
            self.parts(flat.new_full((), time), self.split_proper(proper))

    def look_swapped(self, time: float, flat: Tensor) -> None:
        """Check that a swap reaches what the right-hand side uses of the tracked tensors.

        Raises:
            CompilationError: if it does not; what is not swapped would have no gradient.
        """
        if self.swap is None or self.watch.direction != "backward":
            return
        others = [tensor.detach().clone().requires_grad_() for tensor in self.tracked]
        t, proper = flat.new_full((), time), self.split_proper(flat[: self.proper_size].detach())
        with torch.enable_grad():
            parts = self.swap(others)[0](t, proper)
        try:
            self._check_tracked([t, *proper, *others], parts)
        except UntrackedTensor as error:
            raise CompilationError(
                "the field uses parameters that it does not look up by their names, such as those "
                "in a list of its own"
            ) from error

    def split(self, flat: Tensor) -> State:
        """The parts of the state in a flat vector, or in several: ``(*times, size)``."""
        return self._cut(flat, 0, len(self.shapes))

    def split_proper(self, flat: Tensor) -> State:
        """The parts of the proper state."""
        return self._cut(flat, 0, self.proper)

    def split_integrals(self, flat: Tensor) -> State:
        """The integrals, which lie behind the proper state."""
        return self._cut(flat, self.proper, len(self.shapes))

    def _cut(self, flat: Tensor, start: int, end: int) -> State:
        return cut(flat, self.sizes[start:end], self.shapes[start:end])

    def _check_shapes(self, parts: State) -> None:
        self.unchecked = False
        came = [tuple(part.shape) for part in parts]
        if came != [tuple(shape) for shape in self.shapes]:
            raise ValueError(
                f"the velocity must have the shapes of the state, {[*map(tuple, self.shapes)]}, "
                f"and has {came}"
            )
        if any(part.dtype != self.dtype for part in parts):
            raise TypeError(
                f"the velocity must have the state's dtype {self.dtype}, and has "
                f"{[part.dtype for part in parts]}; move the field to it, e.g. flow.to(dtype)"
            )

    def _check_tracked(self, known: Sequence[Tensor], parts: State) -> None:
        self.untraced = False
        # leaves are told by identity; others by the place where their graph was entered
        leaves = {id(tensor) for tensor in known}
        seen: set[tuple[Any, int]] = {
            (tensor.grad_fn, tensor.output_nr) for tensor in known if tensor.grad_fn
        }
        pending: list[tuple[Any, int]] = [(part.grad_fn, part.output_nr) for part in parts]
        while pending:
            edge = pending.pop()
            if edge[0] is None or edge in seen:
                continue
            seen.add(edge)
            variable = getattr(edge[0], "variable", None)  # only the nodes of leaves have one
            if variable is not None and id(variable) not in leaves:
                raise UntrackedTensor(tuple(variable.shape), self.watch.solver.gradient)
            pending.extend(edge[0].next_functions)


def _plain(flat: Tensor) -> Tensor:
    # a view made without gradients would claim a graph that it does not have, and mislead a field
    # that differentiates by the state
    return flat.detach() if flat.requires_grad and not torch.is_grad_enabled() else flat


def cut(flat: Tensor, sizes: Sequence[int], shapes: Sequence[torch.Size]) -> State:
    """The parts in flat vectors ``(*times, size)``, by their sizes and shapes; views."""
    pieces = flat.split(sizes, dim=-1) if len(sizes) != 1 else (flat,)
    ahead = flat.shape[:-1]
    return tuple(piece.view(ahead + shape) for piece, shape in zip(pieces, shapes, strict=True))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one flat vector."""
    if len(parts) == 1:
        return parts[0].reshape(-1)
    return torch.cat([part.reshape(-1) for part in parts])


def error_norm(shapes: Sequence[torch.Size], kinds: Sequence[str | None]) -> Norm:
    """The norm of a flat error: the largest over the parts of the state that count.

    Each part enters with the root mean square of its entries ("batch"), with the largest of them
    ("sample"), or not at all (None). NaN and infinity count as a very large
    error, so that the step shrinks and is tried again: a comparison with NaN would let them pass.
    """
    sizes = [shape.numel() for shape in shapes]
    counted = [
        (i, kind, size**-0.5)
        for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
        if kind is not None and size
    ]

    def norm(flat: Tensor) -> Tensor:
        # detached: the choice of a step is not differentiated
        pieces = flat.detach().split(sizes)
        norms = [
            # torch's own largest norm takes ten times as long on a CPU
            pieces[i].abs().amax()
            if kind == "sample"
            else scale * torch.linalg.vector_norm(pieces[i])
            for i, kind, scale in counted
        ]
        largest = norms[0] if len(norms) == 1 else torch.stack(norms).amax()
        return largest.nan_to_num(nan=HUGE, posinf=HUGE)

    return norm


def finite(tensors: Tensor | Iterable[Tensor]) -> bool:
    """Whether every entry of every tensor is a number."""
    parts = [tensors] if isinstance(tensors, Tensor) else [*tensors]
    # a sum is quick on a CPU; it is not finite if an entry is not, and seldom otherwise
    quick = all(part.device.type == "cpu" for part in parts)
    if quick and math.isfinite(sum(float(part.detach().sum()) for part in parts)):
        return True
    return math.isfinite(float(magnitude(parts)))


def magnitude(tensors: Sequence[Tensor]) -> Tensor:
    """The largest size of an entry of any tensor; NaN or infinite if one of them is."""
    sizes = [part.detach().abs().amax() for part in tensors if part.numel()]
    return torch.stack(sizes).amax() if sizes else torch.zeros(())
