"""What piecewise maps on an interval share: their tails, and finding the bin of a place."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod

import torch
from torch import Tensor

from cnf.bijections.base import Pair, ScalarMap

TAILS = ("linear", "interval", "circular")


@dataclasses.dataclass(frozen=True)
class Spline(ScalarMap):
    """A piecewise map of [−bound, bound] onto itself, and what happens outside.

    - ``"linear"``: the identity;
    - ``"interval"``: nothing, the value is passed on with a log-derivative of −inf;
    - ``"circular"``: the same again, f(z + 2·bound) = f(z) + 2·bound, for angles.

    Attributes:
        bins: the number of pieces.
        bound: half the length of the interval.
        tails: what is outside the interval.
    """

    bins: int = 8
    bound: float = 5.0
    tails: str = "linear"

    def __post_init__(self) -> None:
        if self.tails not in TAILS:
            raise ValueError(f"tails must be one of {', '.join(TAILS)}, got {self.tails!r}")
        if self.bins < 2 or not self.bound > 0:
            raise ValueError(
                f"a spline needs bins >= 2 and bound > 0, got bins={self.bins}, bound={self.bound}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("min_width", "min_height") and not 0 < value * self.bins < 1:
                raise ValueError(
                    f"{field.name} must be positive and below 1/bins = {1 / self.bins:g}, "
                    f"got {value}"
                )
            if field.name == "min_slope" and not 0 < value < 1:
                raise ValueError(f"min_slope must lie between 0 and 1, got {value}")
        if self.tails == "interval":
            object.__setattr__(self, "domain", (-self.bound, self.bound))
            object.__setattr__(self, "codomain", (-self.bound, self.bound))

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """The spline."""
        return self._map(z, parameters, backward=False)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """The spline's inverse, bin by bin."""
        return self._map(x, parameters, backward=True)

    def _map(self, value: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        self.check(parameters)
        bound = self.bound
        if self.tails == "circular":
            turns = torch.floor((value.detach() + bound) / (2 * bound)) * (2 * bound)
            place = (value - turns).clamp(-bound, bound)
        else:
            place = value.clamp(-bound, bound)
        mapped, log_derivative = self._inside(place, parameters, backward=backward)
        if self.tails == "circular":
            return mapped + turns, log_derivative
        inside = value.abs() <= bound
        outside = 0.0 if self.tails == "linear" else -math.inf
        return torch.where(inside, mapped, value), torch.where(inside, log_derivative, outside)

    @abstractmethod
    def _inside(self, place: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        """The spline, or its inverse, as a map of [−bound, bound] onto itself."""


class UnitSpline(Spline):
    """A spline that is written as a map of fractions of its interval."""

    def _inside(self, place: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        fraction = (place / self.bound + 1) / 2
        mapped, log_derivative = self._unit(fraction, parameters, backward=backward)
        return self.bound * (2 * mapped - 1), log_derivative

    @abstractmethod
    def _unit(self, fraction: Tensor, parameters: Tensor, *, backward: bool) -> Pair:
        """The spline, or its inverse, as a map of [0, 1] onto itself."""


def shares(raw: Tensor, minimum: float) -> Tensor:
    """Positive numbers that sum to one along the last axis, none below the minimum.

    >>> shares(torch.zeros(4), 0.01)
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return minimum + (1 - minimum * raw.shape[-1]) * torch.softmax(raw, -1)


def locate(fraction: Tensor, lengths: Tensor) -> Tensor:
    """The index of the piece that each place in [0, 1] lies in, given the pieces' lengths.

    >>> locate(torch.tensor([0.1, 0.9, 1.0]), torch.tensor([0.2, 0.3, 0.5]))
    tensor([0, 2, 2])
    """
    knots = torch.cumsum(lengths.detach(), -1)[..., :-1]
    return (fraction.detach().unsqueeze(-1) >= knots).sum(-1)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """One entry of each row of the table, ``(*shape)``; the table's rows broadcast.

    >>> pick(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0]))
    tensor([3., 1.])
    """
    table = table.expand(*index.shape, table.shape[-1])
    return table.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def below(lengths: Tensor) -> Tensor:
    """Where each piece begins.

    >>> below(torch.tensor([0.25, 0.25, 0.5]))
    tensor([0.0000, 0.2500, 0.5000])
    """
    return torch.cumsum(lengths, -1) - lengths
