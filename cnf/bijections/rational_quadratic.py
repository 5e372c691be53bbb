"""The monotone rational-quadratic spline."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from cnf.arrays import Array
from cnf.bijections.affine import soft_bound, split_parameters, unit_softplus_offset
from cnf.bijections.base import Pair
from cnf.bijections.intervals import Spline
from cnf.compiling import realized
from cnf.registry import record

FORMS = ("softplus", "nflows", "zuko")
# numbers from which on laying them out anew takes less time than it saves
MANY = 1 << 14
# bins up to which compiled code goes through them one by one; more take longer to compile
UNROLLED = 32


@record
@dataclasses.dataclass(frozen=True)
class RationalQuadratic(Spline):
    """A monotone rational-quadratic spline on [−bound, bound] (Durkan et al. 2019).

    In a bin of width w and height h, slope s = h/w, with knot slopes d₀, d₁ and ξ ∈ [0, 1]:
    y = h·(s·ξ² + d₀·ξ(1 − ξ)) / (s + (d₀ + d₁ − 2s)·ξ(1 − ξ)).

    Parameters: ``bins`` raw widths, ``bins`` raw heights, then the raw knot slopes; zero is the
    identity (with ``form="nflows"``, near it). Outside the interval the tails are

    - ``"linear"``: the identity, which the spline joins with slope one (bins − 1 slopes);
    - ``"interval"``: nothing, log-derivative −inf; the slopes at the ends are free (bins + 1);
    - ``"circular"``: the same again, f(z + 2·bound) = f(z) + 2·bound, with equal slopes at both
      ends (bins slopes), for angles (Rezende et al. 2020).

    Knots follow from the parameters by softmax, and slopes by

    - ``"softplus"``: min_slope + softplus(r + c), one at r = 0;
    - ``"nflows"``: min_slope + softplus(r), as that package has it;
    - ``"zuko"``: exp of r softly clipped at |log min_slope|, widths and heights at half of that
      before the softmax, as that package has it; ``min_width`` and ``min_height`` are not used.

    Attributes:
        bins: the number of bins.
        bound: half the length of the interval.
        tails: what is outside the interval.
        min_width: the least width of a bin, as a fraction of the interval.
        min_height: the least height of a bin, as a fraction of the interval.
        min_slope: the least slope at a knot.
        form: how numbers become knots.

    Example:
        >>> import torch
        >>> spline = RationalQuadratic(bins=4, bound=3.0)
        >>> x, _ = spline.forward(torch.tensor([0.5, 9.0]), torch.zeros(2, spline.size))
        >>> x
        tensor([0.5000, 9.0000])
    """

    min_width: float = 1e-3
    min_height: float = 1e-3
    min_slope: float = 1e-3
    form: str = "softplus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")

    @property
    def size(self) -> int:
        """Widths, heights and the slopes that the tails leave free."""
        free = {"linear": -1, "circular": 0, "interval": 1}[self.tails]
        return 3 * self.bins + free

    def _inside(self, place: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        # not in fractions of the interval: near its middle, places have digits that those lack
        (left, width), (bottom, height), (start, end) = self._bin(
            place, parameters, backward=backward
        )
        if backward:
            xi, log_slope = _quadratic_root((place - bottom) / height, width, height, start, end)
            return left + width * xi, -log_slope
        share, slope = _rational((place - left) / width, width, height, start, end)
        return bottom + height * share, torch.log(slope)

    def forward_array(self, z: Array, parameters: Array) -> tuple[Array, Array]:
        """The spline, without a gradient, bin by bin, as ``grown`` lays the parameters."""
        numbers = parameters.transpose(-1, *range(z.ndim)).reshape(self.size, z.size)
        value, bound = z.reshape(-1), self.bound
        turns: Array | float = 0.0
        if self.tails == "circular":
            turns = np.floor((value + bound) / (2 * bound)) * (2 * bound)
        place = np.maximum(np.minimum(value - turns, bound), -bound)
        (left, bottom), (width, height), (start, end) = self._bin_array(place, numbers)
        share, slope = _rational((place - left) / width, width, height, start, end)
        x, log_derivative = bottom + height * share, np.log(slope)
        if self.tails == "circular":
            x += turns
        else:
            outside = ~(np.abs(value) <= bound)  # what is not a number, too
            np.copyto(x, value, where=outside)
            np.copyto(log_derivative, 0 if self.tails == "linear" else -np.inf, where=outside)
        return x.reshape(z.shape), log_derivative.reshape(z.shape)

    def _bin(self, place: Tensor, parameters: Tensor, *, backward: bool) -> tuple[Pair, Pair, Pair]:
        """The bin that each place lies in: (left, width), (bottom, height), slopes."""
        bins = self.bins
        if torch.compiler.is_compiling() and bins <= UNROLLED:
            return self._bin_unrolled(place, parameters, backward=backward)
        raw, slopes = parameters.split([2 * bins, self.size - 2 * bins], -1)
        raw, axis, kind = _laid_out(raw.unflatten(-1, (2, bins)), place.dim())
        raw, least = self._softened(raw), self._least
        minimum: float | Tensor = least[0]
        if least[0] != least[1]:
            rows = torch.arange(2, dtype=raw.dtype, device=raw.device)
            rows = rows.view(_shape(raw.dim(), kind, 2))
            minimum = least[0] + rows * (least[1] - least[0])
        # a softmax whose sums and quotients are taken for one bin only
        powers = torch.exp(raw - raw.detach().amax(axis, keepdim=True))
        sums = torch.cumsum(powers, axis)
        share = (2 * self.bound - bins * minimum) / sums.narrow(axis, bins - 1, 1)
        with torch.no_grad():
            row = 1 if backward else 0
            inner = torch.arange(1, bins, dtype=raw.dtype, device=raw.device) * least[row]
            inner = (inner - self.bound).view(_shape(raw.dim() - 1, axis, bins - 1))
            knots = sums.select(kind, row).narrow(axis, 0, bins - 1) * share.select(kind, row)
            index = (place.unsqueeze(axis) >= knots + inner).sum(axis)
        ends = torch.stack([index, index + 1], -1)
        index = index.unsqueeze(axis).unsqueeze(kind)
        sizes = list(index.shape)
        sizes[kind] = 2
        wide = index.expand(sizes)
        sizes[axis] = bins
        power = powers.expand(sizes).gather(axis, wide)
        below = (sums.expand(sizes).gather(axis, wide) - power) * share
        # without the bins, widths and heights lie along their axis
        edges = (below + (index.to(raw.dtype) * minimum - self.bound)).squeeze(axis).unbind(axis)
        lengths = (power * share + minimum).squeeze(axis).unbind(axis)
        start, end = self._slopes(slopes, ends).unbind(-1)
        return (edges[0], lengths[0]), (edges[1], lengths[1]), (start, end)

    def _bin_unrolled(
        self, place: Tensor, parameters: Tensor, *, backward: bool
    ) -> tuple[Pair, Pair, Pair]:
        """``_bin``, one number after the other: compilers make no vector code of gathers."""
        bins, numbers = self.bins, split_parameters(parameters)
        raw = numbers[:bins], numbers[bins : 2 * bins]
        widths, heights = map(self._pieces, raw, self._least)
        row = heights if backward else widths
        with torch.no_grad():
            index = torch.zeros_like(place)
            for i, total in enumerate(row.sums[:-1], 1):
                knot = total * row.share + (i * row.minimum - self.bound)
                index = index + (place >= knot)
            # kept as a number: masks that are kept as bytes take most of the time
            index = realized(index)

        def pick(table: Sequence[Tensor]) -> Tensor:
            found = table[0]
            for i, value in enumerate(table[1:], 1):
                found = torch.where(index >= i, value, found)
            return found

        def edge(row: _Pieces) -> Tensor:
            below = pick([torch.zeros_like(row.share), *row.sums[:-1]]) * row.share
            return below + (index * row.minimum - self.bound)

        def length(row: _Pieces) -> Tensor:
            return pick(row.powers) * row.share + row.minimum

        knots = self._knots(numbers[2 * bins :], torch.full_like(place, self._one))
        start, end = self._slope(pick(knots[:-1])), self._slope(pick(knots[1:]))
        return (edge(widths), length(widths)), (edge(heights), length(heights)), (start, end)

    def _pieces(self, raw: Sequence[Tensor], minimum: float) -> _Pieces:
        """The bins' raw widths or heights as a softmax of which no quotient is taken yet."""
        raw = [self._softened(one) for one in raw]
        largest = functools.reduce(torch.maximum, raw).detach()
        powers = [torch.exp(one - largest) for one in raw]
        sums = list(itertools.accumulate(powers))
        return _Pieces(powers, sums, (2 * self.bound - self.bins * minimum) / sums[-1], minimum)

    def _bin_array(self, place: Array, numbers: Array) -> tuple[Array, Array, Array]:
        """(left, bottom), (width, height) and slopes of the bin of each of n places, ``(2, n)``.

        The numbers are ``(size, n)``.
        """
        bins, count = self.bins, place.size
        raw, slopes = numbers[: 2 * bins].reshape(2, bins, count), numbers[2 * bins :]
        raw, minimum = self._softened(raw), np.array(self._least, raw.dtype)[:, None]
        powers = raw - raw.max(1, keepdims=True)
        np.exp(powers, out=powers)
        # a product, because NumPy's own cumulative sum goes number by number
        sums = np.tri(bins, dtype=raw.dtype) @ powers
        share = (2 * self.bound - bins * minimum) / sums[:, -1]
        knots = sums[0, :-1] * share[0]
        knots += (np.arange(1, bins, dtype=raw.dtype) * minimum[0] - self.bound)[:, None]
        index = (place >= knots).sum(0)
        at = index * count + np.arange(count)
        power, total = (table.reshape(2, -1).take(at, 1) for table in (powers, sums))
        edges = (total - power) * share + (index.astype(raw.dtype) * minimum - self.bound)
        ends = np.stack([at, at + count])
        return edges, power * share + minimum, self._slopes_array(slopes, ends)

    def _slopes_array(self, raw: Array, ends: Array) -> Array:
        """``_slopes`` of numbers ``(free, n)``, at places in the table of all knots."""
        raw = np.stack(self._knots([*raw], np.full_like(raw[0], self._one))).take(ends)
        if self.form == "zuko":
            return np.exp(soft_bound(raw, -math.log(self.min_slope), "softclip"))
        raw += raw.dtype.type(self._offset)
        return np.maximum(raw, 0) + np.log1p(np.exp(-np.abs(raw))) + raw.dtype.type(self.min_slope)

    def _slopes(self, raw: Tensor, ends: Tensor) -> Tensor:
        """The slopes at the two ends of a bin, ``(*shape, 2)``."""
        if self.tails == "circular":
            ends = ends % self.bins
        elif self.tails == "linear":
            raw = pad(raw, (1, 1), value=self._one)
        return self._slope(raw.expand(*ends.shape[:-1], raw.shape[-1]).gather(-1, ends))

    def _slope(self, raw: Tensor) -> Tensor:
        """The slope at a knot."""
        if self.form == "zuko":
            return torch.exp(soft_bound(raw, -math.log(self.min_slope), "softclip"))
        return self.min_slope + softplus(raw + self._offset)

    def _knots(self, raw: Sequence[Any], one: Any) -> Sequence[Any]:
        """The raw slopes at all knots, from those that the tails leave free."""
        if self.tails == "circular":
            return [*raw, raw[0]]
        return [one, *raw, one] if self.tails == "linear" else raw

    def _softened(self, raw: Any) -> Any:
        """Raw widths and heights, tensors or arrays, as the softmax takes them."""
        if self.form == "zuko":
            return soft_bound(raw, -math.log(self.min_slope) / 2, "softclip")
        return raw

    @property
    def _least(self) -> tuple[float, float]:
        """The least width and height of a bin."""
        if self.form == "zuko":
            return 0.0, 0.0
        return 2 * self.bound * self.min_width, 2 * self.bound * self.min_height

    @property
    def _offset(self) -> float:
        """What is added to a raw slope before the softplus."""
        return 0.0 if self.form == "nflows" else unit_softplus_offset(self.min_slope)

    @property
    def _one(self) -> float:
        """The raw slope of a knot whose slope is one."""
        return unit_softplus_offset(self.min_slope) - self._offset


class _Pieces(NamedTuple):
    """The bins' widths or heights: powers, their cumulative sums, and what lengths they have.

    A bin's is ``power * share + minimum``.
    """

    powers: Sequence[Tensor]
    sums: Sequence[Tensor]
    share: Tensor
    minimum: float


def _laid_out(raw: Tensor, dims: int) -> tuple[Tensor, int, int]:
    """Numbers ``(*shape, 2, bins)`` for points of ``dims`` dimensions, as is fastest.

    Many of them, on a CPU, as ``(bins, 2, *shape)``: sums and comparisons bin by bin go along whole
    vectors so, however few the bins are. A compiler chooses for itself how they lie.

    Returns:
        The numbers, the axis of bins, and that of widths and heights.
    """
    if torch.compiler.is_compiling() or raw.device.type != "cpu" or raw.numel() < MANY:
        return raw, -1, -2
    raw = raw[(None,) * (dims + 2 - raw.dim())]
    return raw.movedim((-1, -2), (0, 1)).contiguous(), 0, 1


def _shape(dims: int, axis: int, size: int) -> list[int]:
    """Ones but along an axis."""
    shape = [1] * dims
    shape[axis] = size
    return shape


def _rational(xi: Any, width: Any, height: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """The share of a bin's height at the share ξ of its width, and the slope there.

    Of tensors or of arrays.
    """
    slope = height / width
    start, end = start / slope, end / slope
    rest = 1 - xi
    product = xi * rest
    denominator = 1 + (start + end - 2) * product
    share = xi * (xi + start * rest) / denominator
    numerator = end * (xi * xi) + 2 * product + start * (rest * rest)
    return share, slope * numerator / (denominator * denominator)


def _quadratic_root(eta: Tensor, width: Tensor, height: Tensor, start: Tensor, end: Tensor) -> Pair:
    """The share of a bin's width at the share η of its height, and the forward log-slope there.

    With slopes in units of the bin's own, ξ solves (1 − b)·ξ² + b·ξ = η, where
    b = d₀ − (d₀ + d₁ − 2)·η. Its discriminant b² + 4(1 − b)·η = (b − 2η)² + 4η(1 − η) is a sum of
    squares, and each sign of b has a form of the root without cancellation.
    """
    eta = eta.clamp(0, 1)  # rounding at a knot
    scale = width / height
    middle = start * scale - ((start + end) * scale - 2) * eta
    root = torch.sqrt((middle - 2 * eta).square() + 4 * eta * (1 - eta))
    total = root + middle.abs()
    positive = middle > 0
    above = 2 * eta / torch.where(positive, total, 1.0)
    below = total / (2 - 2 * torch.where(positive, 0.0, middle))
    xi = torch.where(positive, above, below)
    return xi, torch.log(_rational(xi, width, height, start, end)[1])
