"""A continuous flow: a field, a divergence and a solver that know nothing of each other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnf.costs import PathPoint
from cnf.divergence import Divergence, Exact, event_dims, refuse_coupling, velocity_of
from cnf.ode import Solver, integrate
from cnf.ode.guard import Rhs, State, Swap
from cnf.ode.recorder import Together
from cnf.transforms.base import Mapped, Request, Transform, of_kind

DEFAULT_REQUEST = Request()
M = TypeVar("M", Tensor, Tensor | None)


class Continuous(Transform):
    """The flow of dx/dt = v(t, x, context) from t = 0 (base) to t = 1 (data).

    log |det dx(1)/dx(0)| = ∫₀¹ tr(∂v/∂x) dt, integrated beside x by the same solver.

    Args:
        field: any module with ``forward(t, x, context)``; a vector field unless it has an
            attribute ``event_dims``.
        divergence: how the trace is computed when the request does not say.
        solver: method, tolerances, gradient mode and limits.
        end_time: T; the field sees times in [0, T] and is multiplied by T.
        trainable_end_time: learn T.
        name: what ``count_nfe`` calls this block.

    Paper: Chen et al., "Neural ordinary differential equations", NeurIPS 2018; Grathwohl et al.,
    "FFJORD", ICLR 2019.

    Example:
        >>> import torch
        >>> from cnf.nets import TimeMLP
        >>> flow = Continuous(TimeMLP(2, (16,)))
        >>> x, log_det, _ = flow(torch.zeros(5, 2))
        >>> x.shape, log_det.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        field: nn.Module,
        divergence: Divergence | None = None,
        solver: Solver | None = None,
        *,
        end_time: float = 1.0,
        trainable_end_time: bool = False,
        name: str = "",
    ):
        super().__init__()
        if not end_time > 0:
            raise ValueError(f"end_time must be positive, got {end_time}")
        self.field = _with_context(of_kind("field", field, nn.Module))
        self.divergence = of_kind("divergence", divergence or Exact(), Divergence)
        self.solver = of_kind("solver", solver or Solver(), Solver)
        self.name = name
        self.end_time = float(end_time)
        self.log_end_time: nn.Parameter | None = None
        if trainable_end_time:
            self.log_end_time = nn.Parameter(torch.tensor(math.log(end_time)))

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the transform's own divergence is."""
        return not self.divergence.stochastic

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Integrate from t = 0 to t = 1."""
        return self._outside_graphs(z, (0.0, 1.0), context, request or DEFAULT_REQUEST)

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Integrate from t = 1 to t = 0."""
        return self._outside_graphs(x, (1.0, 0.0), context, request or DEFAULT_REQUEST)

    def clock(self, like: Tensor) -> Tensor:
        """T, a scalar in the dtype and on the device of ``like``."""
        if self.log_end_time is None:
            return like.new_full((), self.end_time)
        return self.log_end_time.exp()

    def trajectory(
        self, z: Tensor, times: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The solution at ``times``, which increase from 0."""
        if torch.is_autocast_enabled(z.device.type):
            with torch.autocast(z.device.type, enabled=False):
                return self.trajectory(_widened(z), times, _widened(context))
        clock = self.clock(z)

        def rhs(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (clock * velocity_of(self.field, clock * t, state[0], context),)

        times = times.to(z)
        start = torch.cat([times.new_zeros(1), times[times > 0]])
        parameters = self._differentiated(context, clock)
        (values,), _ = integrate(
            rhs,
            (z,),
            start,
            self.solver,
            parameters,
            name=self.name,
        )
        return (start, values) if bool(times[0] == 0) else (start[1:], values[1:])

    def _outside_graphs(
        self, value: Tensor, span: tuple[float, float], context: Tensor | None, request: Request
    ) -> Mapped:
        """Solve, without a compiler that traces the call walking into the solver's loop."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self._outside_graphs)(value, span, context, request)
        if torch.is_autocast_enabled(value.device.type):
            # half the digits are noise to a solver, which would take ever smaller steps in it
            with torch.autocast(value.device.type, enabled=False):
                return self._solve(_widened(value), span, _widened(context), request)
        try:
            return self._solve(value, span, context, request)
        except RuntimeError as error:
            if torch._C._are_functorch_transforms_active() and _of_functions(error):
                raise RuntimeError(
                    "the transformations of torch.func do not reach through a solve, whose steps "
                    "depend on the values: instead of vmap, give the whole batch, with as many "
                    "batch axes as it has; instead of grad and jacrev take torch.autograd.grad, "
                    "for second derivatives with create_graph=True and Solver(gradient='backprop')"
                ) from error
            raise

    def _solve(
        self, value: Tensor, span: tuple[float, float], context: Tensor | None, request: Request
    ) -> Mapped:
        if not 0.0 < request.clock < math.inf:
            raise ValueError(
                "a request's clock multiplies the end time and must be positive, got "
                f"{request.clock}"
            )
        clock = self.clock(value) * request.clock
        divergence, noise = request.divergence or self.divergence, None
        if request.log_det or request.costs:
            start = clock.detach() * span[0]
            refuse_coupling(self.field, start, value, context)
            noise = divergence.draw(self.field, start, value, context, request.generator)
        groups = self._groups(value, context, noise)
        if len(groups) == 1:
            return self._solve_group(*groups[0], span, clock, divergence, request)
        together, found = Together(), []
        for group in groups:
            with together.group():
                found.append(self._solve_group(*group, span, clock, divergence, request))
        batch = value.shape[: value.dim() - event_dims(self.field)]

        def whole(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts)).unflatten(0, batch)

        costs = {name: whole([part.costs[name] for part in found]) for name in found[0].costs}
        ends, log_dets = [part.value for part in found], [part.log_det for part in found]
        return Mapped(whole(ends), whole(log_dets), costs)

    def _groups(
        self, value: Tensor, context: Tensor | None, noise: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Samples, contexts and noise of those that are solved together."""
        batch = value.shape[: value.dim() - event_dims(self.field)]
        rows, axes = self.solver.rows_together(value.device), len(batch)
        count = 1 if rows is None else math.ceil(batch.numel() / rows)
        # noise is of each sample, or the same for all of them
        apart = noise is not None and noise.shape[1 : 1 + axes] == batch
        if (
            count < 2
            or getattr(self.field, "couples_batch", True)
            or (context is not None and context.shape[:-1] != batch)
            or (noise is not None and not apart and noise.shape[1 : 1 + axes] != (1,) * axes)
        ):
            return [(value, context, noise)]

        def cut(part: Tensor, axis: int = 0) -> Sequence[Tensor]:
            pieces = part.flatten(axis, axis + axes - 1).tensor_split(count, axis)
            # copies, because compiled code is for one way to lie in memory
            return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]

        contexts: Sequence[Tensor | None] = [None] * count if context is None else cut(context)
        noises: Sequence[Tensor | None] = [None] * count
        if noise is not None:
            noises = cut(noise, 1) if apart else [noise.flatten(1, axes)] * count
        return list(zip(cut(value), contexts, noises, strict=True))

    def _solve_group(
        self,
        value: Tensor,
        context: Tensor | None,
        noise: Tensor | None,
        span: tuple[float, float],
        clock: Tensor,
        divergence: Divergence,
        request: Request,
    ) -> Mapped:
        # not on the value's device, which would have to be waited for: solvers read them as numbers
        times = torch.tensor(span, dtype=value.dtype)
        traced = noise is not None
        products = any(cost.needs_products for cost in request.costs)
        # costs are integrals over |dt|: they grow in whichever direction the solver walks
        heading = 1.0 if span[1] > span[0] else -1.0
        # a name of its own, because compiled loops know a right-hand side by the modules it holds
        field = self.field
        batch = value.shape[: value.dim() - event_dims(field)]
        samples = traced and request.variance and divergence.stochastic
        if samples and divergence.estimates < 2:
            raise ValueError(
                f"the variance of an estimate needs at least two of them, and {divergence} makes "
                "one; ask for more, e.g. Hutchinson(probes=8)"
            )

        def velocity(
            t: Tensor, state: State, context: Tensor | None = context, clock: Tensor = clock
        ) -> State:
            return (clock * velocity_of(field, clock * t, state[0], context),)

        def rhs(
            t: Tensor, state: State, context: Tensor | None = context, clock: Tensor = clock
        ) -> State:
            if noise is None:
                return velocity(t, state, context, clock)
            x, t = state[0], clock * t
            point = divergence(field, t, x, context, noise, products)
            at = PathPoint(field, t, x, context, point)
            trace = point.divergence
            if samples and point.samples is not None:
                trace = point.samples.movedim(0, -1)
            return (
                clock * point.velocity,
                clock * trace,
                *[heading * clock * cost(at) for cost in request.costs],
            )

        state = [value]
        if traced:
            shape = (*batch, divergence.estimates) if samples else batch
            state += [value.new_zeros(shape), *[value.new_zeros(batch) for _ in request.costs]]
        loops = bool(self.solver.compile) and torch.is_grad_enabled()
        solution, _ = integrate(
            rhs,
            tuple(state),
            times,
            self.solver.at(request.tolerance),
            self._differentiated(context, clock),
            integrals=len(state) - 1,
            proper_rhs=velocity,
            swap=self._swap(rhs, velocity, context) if loops else None,
            in_norm=[True] * (1 + traced) + [request.costs_in_norm] * len(request.costs),
            name=self.name,
        )
        end, *integrals = [values[-1] for values in solution]
        costs = dict(zip([cost.name for cost in request.costs], integrals[1:], strict=True))
        log_det = integrals[0] if traced else value.new_full(batch, math.nan)
        if request.variance:
            costs["log_det_variance"] = value.new_zeros(batch)
        if samples:
            costs["log_det_variance"] = log_det.var(-1) / log_det.shape[-1]
            log_det = log_det.mean(-1)
        return Mapped(end, log_det, costs)

    def _differentiated(self, context: Tensor | None, clock: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return ()
        # the adjoint's gradient is silently zero for whatever is not among these
        return (*self.field.parameters(), *([] if context is None else [context]), clock)

    def _swap(
        self, rhs: Callable[..., State], velocity: Callable[..., State], context: Tensor | None
    ) -> Swap:
        """Both right-hand sides with other tensors in place of what is differentiated."""
        names = [f"field.{name}" for name, _ in self.field.named_parameters()]
        caller = _Caller(self.field)

        def swap(numbers: Sequence[Tensor]) -> tuple[Rhs, Rhs]:
            field = dict(zip(names, numbers, strict=False))
            seen, clock = None if context is None else numbers[-2], numbers[-1]

            def swapped(function: Callable[..., State]) -> Rhs:
                return lambda t, state: functional_call(
                    caller, field, (function, t, state, seen, clock)
                )

            return swapped(rhs), swapped(velocity)

        return swap

    def extra_repr(self) -> str:
        """What is not a module."""
        learned = ", trainable" if self.log_end_time is not None else ""
        time = f", end_time={self.end_time}{learned}" if self.end_time != 1 or learned else ""
        return f"divergence={self.divergence}, solver={self.solver}{time}"


class _Caller(nn.Module):
    """Calls what calls a field, for ``functional_call`` to give the field other parameters."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(self, function: Callable[..., State], *arguments: Any) -> State:
        return function(*arguments)


def _with_context(field: nn.Module) -> nn.Module:
    """The field, refused at once if it takes no context, as those of other packages do not."""
    try:
        signature = inspect.signature(field.forward)
    except (TypeError, ValueError):
        return field  # nothing is known of it
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise TypeError(
            "a field is called as field(t, x, context), and the forward of this "
            f"{type(field).__name__} takes {signature}: give it a context=None that it ignores"
        ) from None
    return field


def _widened(value: M) -> M:
    """The numbers, if any, in float32 at least, which autocasting may have taken from them."""
    return value if value is None or value.dtype.itemsize >= 4 else value.float()


def _of_functions(error: RuntimeError) -> bool:
    """Whether an error is torch's of what ``torch.func`` cannot transform."""
    return "vmap" in str(error) or "setup_context" in str(error)
