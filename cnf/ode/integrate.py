"""``integrate``: an initial value problem, its gradient, and what both cost."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from cnf.ode import adjoint, stepper
from cnf.ode.checks import check_state, check_times
from cnf.ode.compiled import CompiledSteps, settings, travel, travel_back
from cnf.ode.errors import (
    NonFiniteState,
    SecondOrderGradient,
    SolverError,
    SolverWarning,
    StepUnderflow,
    TooManySteps,
)
from cnf.ode.guard import Rhs, State, Swap, Velocity, Watch, error_norm, finite
from cnf.ode.heap import keep_freed
from cnf.ode.quadrature import QuadratureSteps, inner_stages
from cnf.ode.recorder import Stats
from cnf.ode.runge_kutta import PlainSteps, Steps, evaluate, tableau
from cnf.ode.solver import ADAPTIVE, FIXED, SCIPY, Solver
from cnf.ode.traced import Spec


def integrate(
    rhs: Rhs,
    state: State,
    times: Tensor,
    solver: Solver,
    parameters: Sequence[Tensor] = (),
    *,
    integrals: int = 0,
    proper_rhs: Rhs | None = None,
    swap: Swap | None = None,
    in_norm: Sequence[bool] | None = None,
    name: str = "",
) -> tuple[State, Stats]:
    """Solve dy/dt = rhs(t, y), y(times[0]) = state.

    Args:
        rhs: the right-hand side, from a time (a scalar tensor) and a tuple of tensors to a tuple
            of tensors of the same shapes.
        state: the initial state, a tuple of tensors of any shapes, one dtype and one device.
        times: where the solution is wanted, ``(times,)``, increasing or decreasing; the first is
            where the state is given. Equal times return the state.
        solver: how to integrate, and how to differentiate.
        parameters: all tensors besides the state that need a gradient under
            ``gradient="adjoint"`` and ``"checkpoint"``: the field's parameters, the context, the
            clock; leaves or not. What is left out and used is refused in the backward pass.
        integrals: how many parts at the end of the state are only integrated beside the others:
            ``rhs`` gives their derivatives, but is called without them. The adjoint leaves them
            out of its state, and ``Solver.quadrature`` out of the stages of its steps.
        proper_rhs: the derivatives of the other parts alone, where they cost less than all.
        swap: gives both right-hand sides with other tensors in place of ``parameters``, so that
            what is compiled can go all the way back in one piece of code.
        in_norm: which parts of the state steer the step size; None means all of them.
        name: what recorders and errors call this solve.

    Returns:
        The solution at ``times``, each part ``(times, *shape)``, and the work of the forward pass.

    Raises:
        SolverError: when the solve cannot reach its end; its kinds say why. Gradients raise it
            from the backward pass too.
        SecondOrderGradient: from the backward pass, when ``create_graph=True`` asks a mode for
            second derivatives that it does not have.
        UntrackedTensor: from the backward pass, when the velocity uses what was not declared.

    Example:
        >>> import torch
        >>> from cnf.ode import Solver, integrate
        >>> decay = lambda t, state: (-state[0],)
        >>> (y,), stats = integrate(decay, (torch.ones(2),), torch.tensor([0.0, 1.0]), Solver())
        >>> y.shape, bool((y[1] - torch.exp(torch.tensor(-1.0))).abs().max() < 1e-5)
        (torch.Size([2, 2]), True)
    """
    shapes = check_state(state)
    points = check_times(times, solver)
    tracked = tuple(parameter for parameter in parameters if parameter.requires_grad)
    constant = tuple(p for p in parameters if not (p.requires_grad or p.is_inference()))
    counted = [True] * len(state) if in_norm is None else list(in_norm)
    if len(counted) != len(state) or not any(counted):
        raise ValueError(
            f"in_norm must have one entry for each of the {len(state)} parts of the state, at "
            f"least one of them true; got {in_norm}"
        )
    if not 0 <= integrals < len(state):
        raise ValueError(
            f"integrals must leave at least one of the {len(state)} parts of the state, got "
            f"{integrals}"
        )
    problem = Problem(
        rhs, shapes, points, times, state[0], solver, tracked, constant, integrals, proper_rhs,
        swap and _of_tracked(swap, parameters), counted, name,
    )  # fmt: skip
    if points[0] == points[-1] or not any(shape.numel() for shape in shapes):
        return _at_rest(state, len(points), tracked), problem.watch.finish()
    keep_freed()
    flat = torch.cat([part.reshape(-1) for part in state])
    try:
        solution, stats = problem.solve(flat)
    except (StepUnderflow, TooManySteps) as error:
        if solver.fallback is None:
            raise
        solution, stats = problem.falling_back(error).solve(flat)
    return problem.velocity.split(solution), stats


class Problem:
    """An initial value problem on flat vectors, with everything that its passes share."""

    def __init__(
        self,
        rhs: Rhs,
        shapes: Sequence[torch.Size],
        points: list[float],
        times: Tensor,
        like: Tensor,
        solver: Solver,
        tracked: tuple[Tensor, ...],
        constant: tuple[Tensor, ...],
        integrals: int,
        proper_rhs: Rhs | None,
        swap: Swap | None,
        in_norm: list[bool],
        name: str,
    ):
        self.points = points
        self.times = times.detach()
        self.solver = solver
        self.tracked, self.constant = tracked, constant
        self.integrals = integrals
        # without a right-hand side of its own for the state there is nothing to save
        wanted = proper_rhs is not None if solver.quadrature is None else solver.quadrature
        self.by_quadrature = bool(integrals) and wanted and solver.has_quadrature
        self.in_norm = in_norm
        self.norms = tuple(solver.norm if counts else None for counts in in_norm)
        self.norm = error_norm(shapes, self.norms)
        self.device = like.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.watch = Watch(solver, points, torch.finfo(like.dtype).eps, name)
        self.velocity = Velocity(
            rhs, shapes, like.dtype, self.watch, tracked, integrals, proper_rhs, swap
        )

    def solve(self, flat: Tensor) -> tuple[Tensor, Stats]:
        """The solution, ``(times, size)``, and the work of the forward pass."""
        watch, solver = self.watch, self.solver
        watch.begin("forward", solver.method in ADAPTIVE, solver.method == SCIPY)
        try:
            watch.starts(flat, self.points[0])
            self._check_grid(solver.method)
            solution = self._forward(flat)
            watch.arrived(solution, self.points[-1], "the solution is")
        finally:
            stats = watch.finish()
        return solution, stats

    def _forward(self, flat: Tensor) -> Tensor:
        mode = self.solver.gradient
        if mode == "backprop":
            return self.odeint(flat)
        if not (torch.is_grad_enabled() and (flat.requires_grad or self.tracked)):
            with torch.no_grad():
                if not self.solver.walks:
                    return self.odeint(flat)
                return self.walk(flat, keep=False).solution
        if mode == "checkpoint":
            return _Checkpointed.apply(self, flat, *self.tracked)
        function = _Adjoint if self.solver.walks else _TorchdiffeqAdjoint
        return function.apply(self, flat, *self.tracked)

    def odeint(self, flat: Tensor) -> Tensor:
        """The solution by torchdiffeq, differentiable as plain code is."""
        solver = self.solver
        options = self._options(solver.method, solver.options)
        if solver.method in ADAPTIVE and "first_step" not in options:
            with torch.no_grad():
                start = flat.detach()
                options["first_step"] = self.steps().begin(self.points[0], start, self.watch.sign)[
                    1
                ]
        return self._finished(
            odeint(
                self.velocity,
                flat,
                self.times.to(flat.device),
                rtol=solver.rtol,
                atol=solver.atol,
                method=solver.method,
                options={**options, "norm": self.norm},
            )
        )

    def odeint_adjoint(self, flat: Tensor) -> Tensor:
        """The solution by torchdiffeq, differentiable by the adjoint."""
        solver, backward = self.solver, self.solver.backward_method
        adjoint_options = self._options(backward, solver.backward_options, backward=True)
        if solver.seminorm:
            adjoint_options["norm"] = "seminorm"
        return self._finished(
            odeint_adjoint(
                self.velocity,
                flat,
                self.times.to(flat.device),
                rtol=solver.rtol,
                atol=solver.atol,
                method=solver.method,
                options={**self._options(solver.method, solver.options), "norm": self.norm},
                adjoint_rtol=solver.adjoint_rtol,
                adjoint_atol=solver.adjoint_atol,
                adjoint_method=backward,
                adjoint_options=adjoint_options,
                adjoint_params=self.tracked,
            )
        )

    def walk(self, flat: Tensor, keep: bool = True) -> stepper.Path:
        """The solution by our own stepper, and the way there if it is to be kept."""
        with self._settings():
            return travel(
                self.steps(), self.plain_steps, flat, self.points, self.solver, self.watch, keep
            )

    def steps(self) -> Steps:
        """The method's steps of the forward pass."""
        solver, velocity = self.solver, self.velocity
        if not solver.compile:
            return self.plain_steps()
        table = tableau(solver.method)
        spec = Spec(velocity.rhs, velocity.proper, self.norms, table)
        if self.by_quadrature:
            spec = spec._replace(alone=velocity.proper_rhs, inner=inner_stages(table))
        return CompiledSteps(spec, velocity.shapes, solver, velocity, looped=spec)

    def plain_steps(self) -> Steps:
        """The same, operation by operation."""
        solver, velocity = self.solver, self.velocity
        table = tableau(solver.method)
        kind = QuadratureSteps if self.by_quadrature else PlainSteps
        return kind(velocity, table, solver.rtol, solver.atol, self.norm)

    def walk_adjoint(self, solution: Tensor, gradient: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The adjoint's gradients of the initial state and of the tracked tensors."""
        watch, solver = self.watch, self.solver.backwards()
        watch.begin("backward", solver.method in ADAPTIVE)
        try:
            self._check_grid(solver.method)
            with self._settings():
                return adjoint.walk_adjoint(
                    self.velocity, solution, self.points, gradient, self.tracked, solver, watch,
                    self.in_norm,
                )  # fmt: skip
        except (StepUnderflow, TooManySteps) as error:
            if self.solver.fallback is None:
                raise
            fixed = self.falling_back(error)
        finally:
            watch.finish()
        return fixed.walk_adjoint(solution, gradient)

    def differentiate(
        self, start: Tensor, solution: Tensor, gradient: Tensor
    ) -> Sequence[Tensor | None]:
        """The gradients of ``start`` and of the tracked tensors by torchdiffeq's adjoint."""
        watch, method = self.watch, self.solver.backward_method
        watch.begin("backward", method in ADAPTIVE, method == SCIPY)
        try:
            self._check_grid(method)
            with self._settings():
                grads = torch.autograd.grad(
                    # retained, so that the user may go backward twice
                    solution, (start, *self.tracked), gradient, allow_unused=True,
                    retain_graph=True,
                )  # fmt: skip
            watch.arrived([g for g in grads if g is not None], self.points[0], "the gradient is")
            return grads
        except (StepUnderflow, TooManySteps) as error:
            self._blame_gradient(error)
            if self.solver.fallback is None:
                raise
            fixed = self.falling_back(error)
        finally:
            watch.finish()
        fixed.watch.begin("backward", adaptive=False)
        with torch.enable_grad():
            solution = fixed.odeint_adjoint(start)
        fixed.watch.finish()
        return fixed.differentiate(start, solution, gradient)

    def differentiate_walk(
        self, path: stepper.Path, gradient: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of the initial state and of the tracked tensors, step by step."""
        watch = self.watch
        watch.begin("backward", adaptive=False)
        try:
            with self._settings():
                return travel_back(
                    self.steps(), self.plain_steps, path, gradient, self.tracked, self.solver, watch
                )
        finally:
            watch.finish()

    def falling_back(self, error: SolverError) -> Problem:
        """The same problem on the fallback's grid, with a warning that says why."""
        solver = self.solver.on_fallback(abs(self.points[-1] - self.points[0]))
        warnings.warn(
            f"{error.what} ({error.direction} pass, t = {error.time}); falling back to "
            f"{self.solver.fallback_steps} steps of {solver.method}",
            SolverWarning,
            stacklevel=3,
        )
        velocity = self.velocity
        problem = Problem(
            velocity.rhs,
            velocity.shapes,
            self.points,
            self.times,
            self.times.new_empty(0, dtype=velocity.dtype),
            solver,
            self.tracked,
            self.constant,
            self.integrals,
            velocity.proper_rhs,
            velocity.swap,
            self.in_norm,
            self.watch.name,
        )
        problem.autocast = self.autocast
        return problem

    def _settings(self) -> contextlib.ExitStack:
        """What the compiler of steps is to be told, once for a pass; precision as at the start."""
        stack = contextlib.ExitStack()
        if torch.is_autocast_enabled(self.device) != self.autocast:
            stack.enter_context(torch.autocast(self.device, enabled=self.autocast))
        if self.solver.compile:
            stack.enter_context(settings())
        return stack

    def _finished(self, solution: Tensor) -> Tensor:
        if len(solution) < len(self.points):
            # scipy returns what it has when it gives up
            self.watch.fail(StepUnderflow, f"{SCIPY} gave up", self.points[len(solution)])
        return solution

    def _options(
        self, method: str, options: Mapping[str, Any], backward: bool = False
    ) -> dict[str, Any]:
        options = dict(options)
        if method in FIXED:
            size = stepper.step_size(self.solver, self.points)
            options["grid_constructor"] = lambda func, y, times: times.new_tensor(
                stepper.grid(times.tolist(), size)
            )
        if method in ADAPTIVE:
            # without a step to land on, the field would be evaluated beyond the last time, and
            # the solution interpolated, which loses digits under every method
            # the backward pass counts time in the direction of the forward pass
            sign = self.watch.sign if backward else 1.0
            jumps = {sign * t for t in options.get("jump_t", ())}
            steps = {sign * t for t in (*options.get("step_t", ()), *self.points)} - jumps
            for key, values in (("step_t", steps), ("jump_t", jumps)):
                if values:
                    options[key] = torch.tensor(sorted(values), dtype=torch.float64)
        return options

    def _check_grid(self, method: str) -> None:
        if method not in FIXED:
            return
        count = len(stepper.grid(self.points, stepper.step_size(self.solver, self.points))) - 1
        if count > self.solver.max_steps:
            what = f"the grid has {count} steps, more than max_steps={self.solver.max_steps}"
            self.watch.fail(TooManySteps, what, self.points[0])

    def _blame_gradient(self, error: SolverError) -> None:
        """Raise ``NonFiniteState`` where the backward pass stopped, if that is the reason."""
        time, state = self.watch.stopped_at
        if not isinstance(state, tuple) or not state:
            return
        with torch.enable_grad():
            y = state[1].detach().requires_grad_()
            velocity = evaluate(self.velocity, time, y)
            grads = torch.autograd.grad(
                velocity, (y, *self.tracked), state[2], allow_unused=True, retain_graph=True
            )
        if not finite([grad for grad in grads if grad is not None]):
            self.watch.fail(NonFiniteState, "the velocity's gradient is not finite", time)


class _Adjoint(torch.autograd.Function):
    """The adjoint by our own stepper: nothing is kept but the solution."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, flat: Tensor, *parameters: Tensor) -> Tensor:
        solution = problem.walk(flat, keep=False).solution
        ctx.problem = problem
        # for torch to refuse a backward pass after any of them has changed
        ctx.save_for_backward(solution, *parameters, *problem.constant)
        return solution

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise SecondOrderGradient("adjoint")
        start, grads = ctx.problem.walk_adjoint(ctx.saved_tensors[0], gradient)
        return None, start, *grads


class _TorchdiffeqAdjoint(torch.autograd.Function):
    """torchdiffeq's adjoint, in a pass that is counted, checked, and repeated where it fails."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, flat: Tensor, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.start = flat.detach().requires_grad_()
            ctx.solution = problem.odeint_adjoint(ctx.start)
        ctx.problem = problem
        ctx.save_for_backward(*parameters, *problem.constant)
        return ctx.solution.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise SecondOrderGradient("adjoint")
        _ = ctx.saved_tensors  # is where torch looks whether they have changed
        return None, *ctx.problem.differentiate(ctx.start, ctx.solution, gradient)


class _Checkpointed(torch.autograd.Function):
    """Steps whose states are kept and whose activations are computed again."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, flat: Tensor, *parameters: Tensor) -> Tensor:
        path = problem.walk(flat)
        ctx.problem = problem
        ctx.steps, ctx.arrivals, ctx.indices = path.steps, path.arrivals, list(path.kept)
        # all of them, as under the adjoint
        ctx.save_for_backward(*path.kept.values(), *parameters, *problem.constant)
        return path.solution

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise SecondOrderGradient("checkpoint")
        kept = dict(zip(ctx.indices, ctx.saved_tensors, strict=False))
        path = stepper.Path(gradient, ctx.steps, ctx.arrivals, kept)
        start, grads = ctx.problem.differentiate_walk(path, gradient)
        return None, start, *grads


def _of_tracked(swap: Swap, parameters: Sequence[Tensor]) -> Swap:
    """A swap of those parameters alone that require grad."""

    def swapped(numbers: Sequence[Tensor]) -> tuple[Rhs, Rhs]:
        given = iter(numbers)
        return swap([next(given) if tensor.requires_grad else tensor for tensor in parameters])

    return swapped


def _at_rest(state: State, count: int, tracked: Sequence[Tensor]) -> State:
    # an empty sum of each parameter: zero, and connected, so that its gradient is zero, not None
    nothing = [parameter.reshape(-1)[:0].sum() for parameter in tracked]
    return tuple(
        sum((zero.to(part) for zero in nothing), part.expand(count, *part.shape).clone())
        for part in state
    )
