"""The pinwheel: arms of one Gaussian, each twisted by an amount that grows outwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cnf.data.targets import Noise, Target

_STEPS = 80


def _solve(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, end: Tensor
) -> Tensor:
    """The zero of a function that rises monotonically from ``start`` to ``end``, elementwise.

    Newton's method inside a shrinking bracket. Where there is no zero it ends at the nearer end.

    Args:
        function: from points to values and derivatives.
        start: where the function is negative; may lie on either side of ``end``.
        end: where it is positive.
    """
    point = 0.5 * (start + end)
    for step in range(1, _STEPS + 1):
        value, slope = function(point)
        below = value < 0
        start, end = torch.where(below, point, start), torch.where(below, end, point)
        newton = point - value / slope
        # Newton creeps beside a fold, where the slope vanishes: bisect now and then.
        inside = ((newton - start) * (newton - end) < 0) & (step % 4 != 0)
        following = torch.where(inside, newton, 0.5 * (start + end))
        moved = torch.where(value == 0, 0.0, (following - point).abs())
        point = torch.where(value == 0, point, following)
        if not (moved > 1e-14).any():
            break
    return point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pinwheel(Target):
    """Five arms: a Gaussian f ~ N((1, 0), diag(0.3², 0.1²)), twisted, turned and doubled.

    Arm k turns f clockwise by δ = 2π k / 5 + 0.25 exp(f₀) and doubles it. Its Jacobian
    determinant is 4 (1 + 0.25 f₁ exp(f₀)), which vanishes on a fold far from the mass, so that

        p(x) = Σ over arms and f with x(f) = x of N(f) / (5 · 4 |1 + 0.25 f₁ exp(f₀)|).

    Turning keeps the norm, so with f = (r cos α, r sin α), r = ‖x‖ / 2, and φ the angle of x, all
    these f are the solutions α in [-π, π) of

        g(α) = α - 0.25 exp(r cos α) = φ + 2π j / 5,   j any integer.

    g has at most two turning points (exp(r cos α) sin α has one hump), so it falls into at most
    three monotone branches, in each of which every level has exactly one solution.

    Attributes:
        arms: how many.
        radial: standard deviation of f₀.
        tangential: standard deviation of f₁.
        rate: of the twist.
    """

    arms: int = 5
    radial: float = 0.3
    tangential: float = 0.1
    rate: float = 0.25

    # Solutions kept in each branch, the weightiest; what is left out is below 1e-6 of the sum.
    _LEVELS = 64
    # Radius (of f) beyond which the solutions crowd beyond counting and p < exp(-450).
    _CROWDED = 10.0

    @property
    def _width(self) -> int:
        return 2 * self._LEVELS

    def _draw(self, n: int, noise: Noise) -> Tensor:
        arm = noise.choice(self.arms, n)
        normal = noise.normal(n, 2)
        along, across = 1 + self.radial * normal[:, 0], self.tangential * normal[:, 1]
        turn = 2 * math.pi / self.arms * arm + self.rate * along.exp()
        cos, sin = turn.cos(), turn.sin()
        return 2 * torch.stack((along * cos + across * sin, across * cos - along * sin), -1)

    def _log_density(self, x: Tensor) -> Tensor:
        crowded = torch.linalg.vector_norm(x.detach(), dim=-1) / 2 > self._CROWDED
        if not crowded.any():
            return self._counted(x)
        value = torch.zeros_like(x[:, 0])
        value = value.index_put((~crowded,), self._counted(x[~crowded]))
        return value.index_put((crowded,), self._averaged(x[crowded]))

    def _log_gaussian(self, along: Tensor, across: Tensor) -> Tensor:
        square = ((along - 1) / self.radial).square() + (across / self.tangential).square()
        return -0.5 * square - math.log(2 * math.pi * self.radial * self.tangential)

    def _counted(self, x: Tensor) -> Tensor:
        """The sum over all solutions."""
        with torch.no_grad():
            row, slot, level, turn = self._solutions(x)
        for _ in range(2):
            # Newton steps from the solution itself: they carry its first and second derivatives.
            along, across = self._untwist(x[row], turn)
            slope = self._slope(along, across)
            turn = turn - (turn - self.rate * along.exp() - level) / slope
        along, across = self._untwist(x[row], turn)
        term = self._log_gaussian(along, across) - self._slope(along, across).abs().log()
        width = int(slot.max()) + 1 if len(slot) else 1
        terms = x.new_full((len(x), width), -torch.inf).index_put((row, slot), term)
        return torch.logsumexp(terms, -1) - math.log(4 * self.arms)

    def _averaged(self, x: Tensor) -> Tensor:
        """The mean over the angle of x: Laplace's integral over α, exact for large radii."""
        radius = torch.linalg.vector_norm(x, dim=-1) / 2
        precision = 1 / self.tangential**2 - (1 - 1 / radius) / self.radial**2
        peak = self._log_gaussian(radius, torch.zeros_like(radius))
        width = radius.log() + 0.5 * (2 * math.pi * precision).log()
        return peak - width - math.log(4)

    def _untwist(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of f, given x and the angle that it was turned by."""
        cos, sin = turn.cos() / 2, turn.sin() / 2
        return x[:, 0] * cos - x[:, 1] * sin, x[:, 0] * sin + x[:, 1] * cos

    def _slope(self, along: Tensor, across: Tensor) -> Tensor:
        """The derivative of g, never exactly zero: on the fold the density is infinite."""
        slope = 1 + self.rate * across * along.exp()
        return torch.where(slope.abs() < 1e-15, 1e-15, slope)

    def _solutions(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All (row of x, running number in that row, 2π j / 5, angle δ = α - φ)."""
        radius = torch.linalg.vector_norm(x, dim=-1) / 2
        phase = torch.atan2(x[:, 1], x[:, 0])

        # The circle is cut at -π and falls at the two folds into three branches, from a corner to
        # a corner; without folds all three corners are the cut, and only the first is not empty.
        cut = torch.full_like(radius, -math.pi)
        near, far = self._folds(radius)
        start = torch.stack((-near, -near, cut), -1)
        end = torch.stack((-cut, -far, -far), -1)

        # Levels from each corner on, rounded once: a solution at a corner belongs to one branch.
        spacing = 2 * math.pi / self.arms
        corners = torch.stack((cut, -near, -far), -1)
        g = corners - self.rate * (radius[:, None] * corners.cos()).exp()
        above = ((g - phase[:, None]) / spacing).ceil()
        first = above[:, (1, 1, 0)]
        last = torch.stack((above[:, 0] + self.arms, above[:, 2], above[:, 2]), -1)
        count = (last - first).clamp(0, self._LEVELS).long()

        flat = count.flatten()
        branch = torch.arange(len(flat), device=x.device).repeat_interleave(flat)
        running = torch.arange(len(branch), device=x.device)
        row = branch // 3
        slot = running - (count.sum(-1).cumsum(0) - count.sum(-1))[row]
        level = spacing * (first.flatten()[branch] + running - (flat.cumsum(0) - flat)[branch])
        r, goal = radius[row], phase[row] + level

        def miss(alpha: Tensor) -> tuple[Tensor, Tensor]:
            power = self.rate * (r * alpha.cos()).exp()
            return alpha - power - goal, 1 + r * alpha.sin() * power

        alpha = _solve(miss, start.flatten()[branch], end.flatten()[branch])
        return row, slot, level, alpha - phase[row]

    def _folds(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The two β with g'(-β) = 0, the smaller first; π where there are none."""
        cosine = 2 * radius / (1 + (1 + 4 * radius.square()).sqrt())
        hump = cosine.acos()
        folded = self.rate * radius * hump.sin() * (radius * cosine).exp() > 1
        r, hump = radius[folded], hump[folded]

        def fall(beta: Tensor) -> tuple[Tensor, Tensor]:
            sin, cos = beta.sin(), beta.cos()
            power = self.rate * r * (r * cos).exp()
            return power * sin - 1, power * (cos - r * sin.square())

        near, far = torch.full_like(radius, math.pi), torch.full_like(radius, math.pi)
        near[folded] = _solve(fall, torch.zeros_like(hump), hump)
        far[folded] = _solve(fall, torch.full_like(hump, math.pi), hump)
        return near, far
