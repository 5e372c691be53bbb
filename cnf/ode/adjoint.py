"""The adjoint's backward pass for Runge-Kutta methods, without the integrals in its state.

torchdiffeq's adjoint solves back everything that was integrated. Integrals (the log-determinant,
costs) enter no velocity: their adjoints are constant and their values are not needed, so only the
state proper and its adjoint go back, with the parameters' gradients as quadratures beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnf.ode.guard import Norm, Velocity, Watch, error_norm
from cnf.ode.solver import Solver
from cnf.ode.stepper import advance


class Backward:
    """d/ds of (y, a, g) along a solution y, where a is its adjoint and g the parameters' gradient.

    Args:
        velocity: the right-hand side of the forward pass.
        tracked: the parameters, all of which require grad.
        sources: the constant adjoints of the integrals.
    """

    def __init__(self, velocity: Velocity, tracked: Sequence[Tensor], sources: Sequence[Tensor]):
        self.velocity = velocity
        self.tracked = tracked
        self.sources = sources
        self.size = velocity.proper_size

    def __call__(self, t: Tensor, flat: Tensor) -> Tensor:
        """The derivative of the flat (y, a, g), all of it by the time of the forward pass."""
        with torch.enable_grad():
            y = flat[: self.size].detach().requires_grad_()
            parts = self.velocity.parts(t, y)
            adjoints = self.velocity.split_proper(flat[self.size : 2 * self.size])
            grads = self.gradients(parts, y, adjoints)
        derivative = torch.cat(
            [
                *[part.detach().reshape(-1) for part in parts[: len(adjoints)]],
                *[-grad.reshape(-1) for grad in grads],
            ]
        )
        self.velocity.watch.velocity = derivative
        return derivative

    def gradients(
        self, parts: Sequence[Tensor], y: Tensor, adjoints: Sequence[Tensor]
    ) -> list[Tensor]:
        """The products of the adjoints and the derivatives of the velocity's parts."""
        wanted = (y, *self.tracked)
        used = [
            (part, adjoint)
            for part, adjoint in zip(parts, (*adjoints, *self.sources), strict=True)
            if part.requires_grad
        ]
        if not used:
            return [torch.zeros_like(tensor) for tensor in wanted]
        return list(
            torch.autograd.grad(
                [part for part, _ in used],
                wanted,
                [adjoint for _, adjoint in used],
                # retained, because parameters may share what they were computed from
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
        )

    def norm(self, forward: Norm, seminorm: bool) -> Norm:
        """The error norm: the forward pass's of y and of a, and unless semi that of g."""
        size = self.size

        def norm(flat: Tensor) -> Tensor:
            largest = torch.maximum(forward(flat[:size]), forward(flat[size : 2 * size]))
            if not seminorm and flat.numel() > 2 * size:
                rest = flat[2 * size :]
                largest = largest.maximum(torch.linalg.vector_norm(rest) / rest.numel() ** 0.5)
            return largest

        return norm


def walk_adjoint(
    velocity: Velocity,
    solution: Tensor,
    points: Sequence[float],
    gradient: Tensor,
    tracked: Sequence[Tensor],
    solver: Solver,
    watch: Watch,
    in_norm: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
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
    size, parts = velocity.proper_size, velocity.proper
    counted = in_norm[:parts] if any(in_norm[:parts]) else [True] * parts
    norm = error_norm(velocity.shapes[:parts], solver.norm, counted)
    # the equations are linear in the adjoint: at the scale of one, atol means the same for the mean
    # of a batch as for its sum
    scale = gradient.abs().amax().clamp_min(torch.finfo(gradient.dtype).tiny)
    gradient = gradient / scale
    sizes = [parameter.numel() for parameter in tracked]
    adjoint, constant = torch.zeros_like(gradient[0]).tensor_split([size])
    rest = gradient.new_zeros(sum(sizes))
    for index in range(len(points) - 1, 0, -1):
        adjoint = adjoint + gradient[index, :size]
        constant = constant + gradient[index, size:]
        backward = Backward(velocity, tracked, velocity.split_integrals(constant))
        # the solution is known at every requested time: what the way back has lost is made good
        flat = torch.cat([solution[index, :size], adjoint, rest])
        span = (points[index], points[index - 1])
        measure = backward.norm(norm, solver.seminorm)
        for _, after, _ in advance(backward, flat, span, solver, measure, watch):
            flat = after
        adjoint, rest = flat[size : 2 * size], flat[2 * size :]
    start = scale * (torch.cat([adjoint, constant]) + gradient[0])
    grads = (scale * rest).split(sizes)
    return start, [grad.view_as(parameter) for grad, parameter in zip(grads, tracked, strict=True)]
