"""Piecewise linear, quadratic and cubic splines."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from cnf.bijections.affine import unit_softplus_offset
from cnf.bijections.base import Pair, invert
from cnf.bijections.intervals import UnitSpline, below, locate, pick, shares
from cnf.registry import record


@record
@dataclasses.dataclass(frozen=True)
class LinearSpline(UnitSpline):
    """A piecewise linear map of [−bound, bound] onto itself (Müller et al. 2019).

    Bins of equal width; in a bin of height h, y = bottom + h·ξ. The density jumps at the knots.

    Parameters: ``bins`` raw heights; zero is the identity. Tails: see ``Spline``.

    Attributes:
        min_height: the least height of a bin, as a fraction of the interval.

    Example:
        >>> import torch
        >>> spline = LinearSpline(bins=2, bound=1.0)
        >>> x, log_derivative = spline.forward(torch.tensor(-0.5), torch.tensor([1.0, 0.0]))
        >>> round(x.item(), 4), round(log_derivative.item(), 4)
        (-0.2694, 0.3793)
    """

    min_height: float = 1e-3

    @property
    def size(self) -> int:
        """One raw height per bin."""
        return self.bins

    def _unit(self, fraction: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        heights = shares(parameters, self.min_height)
        if backward:
            index = locate(fraction, heights)
        else:
            index = (fraction.detach() * self.bins).long().clamp(0, self.bins - 1)
        height, bottom = pick(heights, index), pick(below(heights), index)
        slope = height * self.bins
        left = index.to(fraction.dtype) / self.bins
        if backward:
            return left + (fraction - bottom) / slope, -torch.log(slope)
        return bottom + (fraction - left) * slope, torch.log(slope)


@record
@dataclasses.dataclass(frozen=True)
class QuadraticSpline(UnitSpline):
    """A piecewise quadratic map of [−bound, bound] onto itself (Müller et al. 2019).

    Its derivative is linear in each bin: with knot slopes v₀, v₁ and bin width w,
    y = bottom + w·(v₀·ξ + (v₁ − v₀)·ξ²/2).

    Parameters: ``bins`` raw widths, then the raw knot slopes, which are scaled so that the areas
    sum to one: bins − 1 with linear tails (the slope at both ends is one, so the map is smooth
    there), bins with circular ones, bins + 1 on the interval. Zero is the identity.

    Attributes:
        min_width: the least width of a bin, as a fraction of the interval.
        min_slope: the least slope at a knot, before scaling.

    Example:
        >>> import torch
        >>> spline = QuadraticSpline(bins=4, bound=1.0)
        >>> x, log_derivative = spline.forward(torch.tensor(0.25), torch.zeros(spline.size))
        >>> round(x.item(), 4), abs(round(log_derivative.item(), 4))
        (0.25, 0.0)
    """

    min_width: float = 1e-3
    min_slope: float = 1e-3

    @property
    def size(self) -> int:
        """Widths, and the slopes that the tails leave free."""
        return 2 * self.bins + {"linear": -1, "circular": 0, "interval": 1}[self.tails]

    def _unit(self, fraction: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        raw_widths, raw_slopes = parameters.split([self.bins, self.size - self.bins], -1)
        widths = shares(raw_widths, self.min_width)
        slopes = self.min_slope + softplus(raw_slopes + unit_softplus_offset(self.min_slope))
        if self.tails == "circular":
            slopes = torch.cat([slopes, slopes[..., :1]], -1)
        elif self.tails == "linear":
            # the slope at the ends must come out as the mean slope: a linear equation for it
            inner = pad(slopes, (1, 1))
            area = (widths * (inner[..., 1:] + inner[..., :-1])).sum(-1, keepdim=True) / 2
            ends = area / (1 - (widths[..., :1] + widths[..., -1:]) / 2)
            slopes = torch.cat([ends, slopes, ends], -1)
        areas = widths * (slopes[..., 1:] + slopes[..., :-1]) / 2
        total = areas.sum(-1, keepdim=True)
        areas, slopes = areas / total, slopes / total

        index = locate(fraction, areas if backward else widths)
        width, left = pick(widths, index), pick(below(widths), index)
        area, bottom = pick(areas, index), pick(below(areas), index)
        start, end = pick(slopes, index), pick(slopes, index + 1)
        if backward:
            share = ((fraction - bottom) / area).clamp(0, 1)
            slope = torch.sqrt(start.square() * (1 - share) + end.square() * share)
            xi = (start + end) * share / (start + slope)
            return left + width * xi, -torch.log(slope)
        xi = (fraction - left) / width
        slope = start + (end - start) * xi
        return bottom + width * xi * (start + slope) / 2, torch.log(slope)


@record
@dataclasses.dataclass(frozen=True)
class CubicSpline(UnitSpline):
    """A monotone cubic spline on [−bound, bound] (Durkan et al. 2019; Steffen 1990).

    Inner knot slopes are Steffen's: with the neighbouring secants s₀, s₁ and bin widths w₀, w₁,
    min(2·s₀, 2·s₁, (s₀·w₁ + s₁·w₀)/(w₀ + w₁)). Inversion is numeric, within a bin.

    Parameters: ``bins`` raw widths and heights, then, unless the tails are circular, a raw slope
    for each end. Zero is the identity. Tails: see ``Spline``.

    Attributes:
        min_width: the least width of a bin, as a fraction of the interval.
        min_height: the least height of a bin, as a fraction of the interval.
        min_slope: the least slope at an end, in units of its bin's secant.

    Example:
        >>> import torch
        >>> spline = CubicSpline(bins=4, bound=1.0)
        >>> x, log_derivative = spline.forward(torch.tensor(0.25), torch.zeros(spline.size))
        >>> round(x.item(), 4), abs(round(log_derivative.item(), 4))
        (0.25, 0.0)
    """

    min_width: float = 1e-3
    min_height: float = 1e-3
    min_slope: float = 1e-3

    @property
    def size(self) -> int:
        """Widths, heights and the slopes at the ends."""
        return 2 * self.bins + (0 if self.tails == "circular" else 2)

    def _unit(self, fraction: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        bins = self.bins
        raw_widths, raw_heights, raw_ends = parameters.split([bins, bins, self.size - 2 * bins], -1)
        widths, heights = shares(raw_widths, self.min_width), shares(raw_heights, self.min_height)
        slopes = self._slopes(widths, heights / widths, raw_ends)

        index = locate(fraction, heights if backward else widths)
        width, left = pick(widths, index), pick(below(widths), index)
        height, bottom = pick(heights, index), pick(below(heights), index)
        secant = height / width
        start, end = pick(slopes, index) / secant, pick(slopes, index + 1) / secant

        def cubic(xi: Tensor) -> Pair:
            rest = 1 - xi
            value = xi * (start * rest.square() + (3 - end) * xi * rest + xi.square())
            slope = start * rest.square() + 2 * (3 - start - end) * xi * rest + end * xi.square()
            return value, torch.log(slope)

        if backward:
            target = ((fraction - bottom) / height).clamp(0, 1)
            zero = torch.zeros_like(target)
            xi, log_derivative = invert(cubic, target, lower=zero, upper=zero + 1)
            return left + width * xi, log_derivative - torch.log(secant)
        value, log_slope = cubic((fraction - left) / width)
        return bottom + height * value, log_slope + torch.log(secant)

    def _slopes(self, widths: Tensor, secants: Tensor, raw_ends: Tensor) -> Tensor:
        """The knot slopes, ``(*shape, bins + 1)``."""
        if self.tails == "circular":
            widths = torch.cat([widths[..., -1:], widths, widths[..., :1]], -1)
            secants = torch.cat([secants[..., -1:], secants, secants[..., :1]], -1)
        before, after = secants[..., :-1], secants[..., 1:]
        width_before, width_after = widths[..., :-1], widths[..., 1:]
        parabola = before * width_after + after * width_before
        parabola = parabola / (width_before + width_after)
        inner = torch.minimum(2 * torch.minimum(before, after), parabola)
        if self.tails == "circular":
            return inner
        # a cubic with end slopes below three secants is monotone; sigmoid(−log 2) = 1/3
        share = torch.sigmoid(raw_ends - math.log(2))
        margin = self.min_slope
        start, end = (margin + (3 - 3 * margin) * share).unbind(-1)
        start, end = start * secants[..., 0], end * secants[..., -1]
        return torch.cat([start.unsqueeze(-1), inner, end.unsqueeze(-1)], -1)
