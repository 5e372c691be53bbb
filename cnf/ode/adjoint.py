"""The adjoint's backward pass for Runge-Kutta methods, without the integrals in its state.

torchdiffeq's adjoint solves back everything that was integrated. Integrals (the log-determinant,
costs) enter no velocity: their adjoints are constant and their values are not needed, so only the
state proper, its adjoint and the parameters' gradients go back; the last, which nothing depends on
either, need not steer the steps. By Lobatto's rule instead of in the stages, as the forward pass
takes its integrals, they would cost more: eight evaluations a step, three of them with the products
for the parameters, are nineteen of the work that six with all three are eighteen of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.ode.compiled import CompiledSteps, travel
from cnf.ode.guard import Rhs, State, Swap, Velocity, Watch, cut, error_norm, join
from cnf.ode.runge_kutta import PlainSteps, Steps, tableau
from cnf.ode.solver import Solver
from cnf.ode.traced import Spec


def backward_rhs(
    rhs: Rhs,
    tracked: Sequence[Tensor],
    sources: Sequence[Tensor],
    count: int,
    anchor: Tensor | None = None,
) -> Rhs:
    """The derivatives of (y, a, g) along a solution y: a its adjoint, g the parameters' gradient.

    Args:
        rhs: the right-hand side of the forward pass, from the parts of y.
        tracked: the parameters, all of which require grad.
        sources: the constant adjoints of the integrals.
        count: how many parts y has.
        anchor: for code that is to be compiled, a zero that requires grad: beside it everything
            does, where a compiler follows no ``requires_grad_``, as torch 2.11's.
    """

    def leaf(part: Tensor) -> Tensor:
        part = part.detach()
        return part.requires_grad_() if anchor is None else part + anchor

    def backward(t: Tensor, state: State) -> State:
        with torch.enable_grad():
            y = [leaf(part) for part in state[:count]]
            parts = rhs(t, tuple(y))
            used = [
                (part, adjoint)
                for part, adjoint in zip(parts, (*state[count:], *sources), strict=True)
                if part.requires_grad
            ]
            grads = _gradients(used, (*y, *tracked))
        rest = [-grad.reshape(-1) for grad in grads[count:]]
        return (
            *[part.detach() for part in parts[:count]],
            *[-grad for grad in grads[:count]],
            *([torch.cat(rest)] if rest else []),
        )

    return backward


def traced_rhs(swap: Swap, tracked: State, sources: Sequence[Tensor], count: int) -> Rhs:
    """The same as ``backward_rhs`` gives, in operations that loops of compiled code follow."""
    # copies, because what a loop looks at must not share memory
    sources = [source.clone() for source in sources]

    def backward(t: Tensor, state: State) -> State:
        def forward(y: State, numbers: State) -> State:
            return swap(numbers)[0](t, y)

        parts, pull = torch.func.vjp(forward, state[:count], tracked)  # type: ignore[misc]
        grads, terms = pull((*state[count:], *sources))
        rest = [-term.reshape(-1) for term in terms]
        return (
            *parts[:count],
            *[-grad for grad in grads],
            *([torch.cat(rest)] if rest else []),
        )

    return backward


def _gradients(used: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> Sequence[Tensor]:
    if not used:
        return [torch.zeros_like(tensor) for tensor in wanted]
    parts, adjoints = zip(*used, strict=True)
    # retained, because parameters may share what they were computed from
    return torch.autograd.grad(
        parts, wanted, adjoints, retain_graph=True, materialize_grads=True, allow_unused=True
    )


class Flattened:
    """A right-hand side on parts, on one flat vector of the proper state or more."""

    def __init__(self, rhs: Rhs, shapes: Sequence[torch.Size], watch: Watch):
        self.rhs = rhs
        self.shapes = shapes
        self.sizes = [shape.numel() for shape in shapes]
        self.size = sum(self.sizes)
        self.watch = watch

    def __call__(self, t: Tensor, flat: Tensor) -> Tensor:
        """The derivative of all parts."""
        slope = join(self.rhs(t, cut(flat[: self.size], self.sizes, self.shapes)))
        self.watch.velocity = slope
        return slope


def walk_adjoint(
    velocity: Velocity,
    solution: Tensor,
    points: Sequence[float],
    gradient: Tensor,
    tracked: Sequence[Tensor],
    solver: Solver,
    watch: Watch,
    in_norm: Sequence[bool],
) -> tuple[Tensor, State]:
    """Solve back from the last time to the first.

    Args:
        velocity: the right-hand side of the forward pass.
        solution: its solution, ``(times, size)``.
        points: the times.
        gradient: of the solution, ``(times, size)``.
        tracked: what else to differentiate by.
        solver: with the method and the tolerances of the backward pass.
        watch: checks every step.
        in_norm: which parts of the state steer the step size.

    Returns:
        The gradients of the initial state and of the parameters.
    """
    size, count = velocity.proper_size, velocity.proper
    proper = velocity.shapes[:count]
    rest = torch.Size([sum(parameter.numel() for parameter in tracked)])
    shapes = [*proper, *proper, *([rest] if tracked else [])]
    counted = in_norm[:count] if any(in_norm[:count]) else [True] * count
    norms: list[str | None] = [solver.norm if counts else None for counts in (*counted, *counted)]
    if tracked:
        norms.append(None if solver.seminorm else "batch")
    table = tableau(solver.method)
    anchor = gradient.new_zeros(()).requires_grad_()

    def plain(sources: Sequence[Tensor]) -> Steps:
        rhs = backward_rhs(velocity.parts, tracked, sources, count)
        flat = Flattened(rhs, shapes[: 2 * count], watch)
        return PlainSteps(flat, table, solver.rtol, solver.atol, error_norm(shapes, norms))

    def steps(sources: Sequence[Tensor]) -> Steps:
        if not solver.compile:
            return plain(sources)
        rhs = backward_rhs(velocity.rhs, tracked, sources, count, anchor)
        spec, looped = Spec(rhs, 2 * count, tuple(norms), table), None
        if velocity.swap is not None:
            looped = spec._replace(rhs=traced_rhs(velocity.swap, tuple(tracked), sources, count))
        return CompiledSteps(spec, shapes, solver, velocity, looped)

    # the equations are linear in the adjoint: at the scale of one, atol means the same for the mean
    # of a batch as for its sum
    scale = gradient.abs().amax().clamp_min(torch.finfo(gradient.dtype).tiny)
    gradient = gradient / scale
    adjoint, constant = torch.zeros_like(gradient[0]).tensor_split([size])
    grads = gradient.new_zeros(rest)
    for index in range(len(points) - 1, 0, -1):
        adjoint = adjoint + gradient[index, :size]
        constant = constant + gradient[index, size:]
        sources = velocity.split_integrals(constant)
        # the solution is known at every requested time: what the way back has lost is made good
        flat = torch.cat([solution[index, :size], adjoint, grads])
        span = (points[index], points[index - 1])
        plainly = functools.partial(plain, sources)
        path = travel(steps(sources), plainly, flat, span, solver, watch, keep=False)
        flat = path.solution[-1]
        adjoint, grads = flat[size : 2 * size], flat[2 * size :]
    start, grads = scale * (torch.cat([adjoint, constant]) + gradient[0]), scale * grads
    watch.arrived([start, grads], points[0], "the gradient is")
    sizes, shapes = [tensor.numel() for tensor in tracked], [tensor.shape for tensor in tracked]
    return start, cut(grads, sizes, shapes)
