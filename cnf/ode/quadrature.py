"""Integrals along a path by Lobatto's rule, with no part in the stages of a step.

What is only integrated beside the state (the log-determinant, costs) is dear to evaluate, and the
stages of a Runge-Kutta method, which lie off the path, are bad places for it. The state walks by
itself; its interpolant says where the path is at the rule's places, and the integrands are
evaluated there: three times a step instead of six, and more exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnf.ode.guard import Velocity
from cnf.ode.runge_kutta import Norm, PlainSteps, Step, Tableau, Trial, combine, evaluate

_HALF = 0.5 / math.sqrt(5)
PLACES = (0.5 - _HALF, 0.5 + _HALF)
"""Where integrands are evaluated besides a step's start and its end."""
WEIGHTS = (1 / 12, 5 / 12, 5 / 12, 1 / 12)
"""Exact for polynomials of degree five."""
# a tenth of what leaving out one place would change: at this scale trained flows cost at most what
# they do with integrals in the state, at a half to a tenth of the error
_DIFFERENCE = tuple(w / 120 for w in (-math.sqrt(5), 5, -5, math.sqrt(5)))


@functools.cache
def inner_stages(table: Tableau) -> tuple[tuple[float, ...], ...]:
    """How a method's stages, its last one among them, make the state at ``PLACES``."""
    return tuple(_interpolated(table, place) for place in PLACES)


def _interpolated(table: Tableau, s: float) -> tuple[float, ...]:
    """The polynomial of degree four through states and slopes at both ends, and the middle."""
    count = len(table.nodes)
    first = [1.0] + [0.0] * (count - 1)
    return tuple(
        s * start
        + s**2 * (end - 4 * start - 5 * weight + 16 * half)
        + s**3 * (5 * start - 3 * end + 14 * weight - 32 * half)
        + s**4 * (2 * end - 2 * start - 8 * weight + 16 * half)
        for start, end, weight, half in zip(
            first, reversed(first), table.weights, table.middle, strict=True
        )
    )


def increment(size: Tensor | float, integrands: Sequence[Tensor]) -> Tensor:
    """What a step adds to an integral, from the integrand at its start, ``PLACES`` and its end."""
    return size * _weighted(WEIGHTS, integrands)


def increment_error(size: Tensor | float, integrands: Sequence[Tensor]) -> Tensor:
    """An estimate of the error of ``increment``, of the order of dopri5's own.

    The difference of two rules knows of the worse one. Beside the integrand's own changes over the
    step it says how well they are resolved, and its power 3/2 is about what remains: of the rule's
    error and of what the path's error makes of the integrand (QUADPACK's estimate; Piessens et al.
    1983).
    """
    mean = _weighted(WEIGHTS, integrands)
    spread = _weighted(WEIGHTS, [(value - mean).abs() for value in integrands])
    apart = _weighted(_DIFFERENCE, integrands).abs()
    # a constant's rounding must not be measured against nothing
    scale = torch.maximum(spread, apart).clamp_min(torch.finfo(spread.dtype).tiny)
    return size * apart * (apart / scale).sqrt()


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total


class Course(NamedTuple):
    """A step, and what it was made of.

    Attributes:
        after: the state at its end.
        slopes: derivatives of the proper state, one for each stage.
        integrands: derivatives of the integrals at the start, at ``PLACES`` and at the end.
    """

    after: Tensor
    slopes: list[Tensor]
    integrands: list[Tensor]


class QuadratureSteps(PlainSteps):
    """Steps taken operation by operation, their integrals by quadrature.

    Args:
        velocity: the right-hand side.
        table: of one of ``cnf.ode.solver.WITH_QUADRATURE``.
        rtol: relative tolerance.
        atol: absolute tolerance.
        norm: of a flat error.
    """

    def __init__(self, velocity: Velocity, table: Tableau, rtol: float, atol: float, norm: Norm):
        super().__init__(velocity, table, rtol, atol, norm)
        self.alone = velocity.alone
        self.inner = inner_stages(table)
        self.sizes = (velocity.proper_size, sum(velocity.sizes) - velocity.proper_size)

    def trial(self, step: Step, y: Tensor, slope: Tensor | None) -> Trial:
        """A step and its error."""
        after, slopes, integrands = self._course(step, y, slope)
        error = torch.cat(
            [
                combine(torch.zeros_like(slopes[0]), step.size, self.table.error, slopes),
                increment_error(step.size, integrands),
            ]
        )
        scale = self.atol + self.rtol * torch.max(y.abs(), after.abs())
        first, last = (torch.cat([slopes[end], integrands[end]]) for end in (0, -1))
        return Trial(after, first, last, self.norm(error / scale))

    def step(self, step: Step, y: Tensor) -> Tensor:
        """The state at the end of a step."""
        return self._course(step, y, None).after

    def _steering(self, slope: Tensor) -> Tensor:
        # integrals start at zero, and their tolerance is at its tightest there
        proper, integrals = slope.split(self.sizes)
        return torch.cat([proper, torch.zeros_like(integrals)])

    def _course(self, step: Step, y: Tensor, slope: Tensor | None) -> Course:
        (time, size), table = step, self.table
        x, integrals = y.split(self.sizes)
        start = evaluate(self.rhs, time, y) if slope is None else slope
        slopes = [start[: len(x)]]
        for i in range(1, table.used):
            at = combine(x, size, table.stages[i], slopes)
            slopes.append(evaluate(self.alone, time + table.nodes[i] * size, at))
        x_after = combine(x, size, table.weights, slopes)
        end = evaluate(self.rhs, time + size, x_after)
        slopes.append(end[: len(x)])
        inside = [
            evaluate(self.rhs, time + place * size, combine(x, size, row, slopes))[len(x) :]
            for place, row in zip(PLACES, self.inner, strict=True)
        ]
        integrands = [start[len(x) :], *inside, end[len(x) :]]
        after = torch.cat([x_after, integrals + increment(size, integrands)])
        return Course(after, slopes, integrands)
