"""Monotone polynomials with linear tails."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cnf.bijections.affine import unit_softplus_offset
from cnf.bijections.base import Function, NumericMap, Pair
from cnf.bijections.quadrature import Rule, gauss_legendre, integral
from cnf.registry import record


@record
@dataclasses.dataclass(frozen=True)
class Bernstein(NumericMap):
    """A Bernstein polynomial with increasing coefficients (Ramasinghe et al. 2021).

    On [−bound, bound], with u the position in it as a fraction, x = Σ θᵢ·C(n, i)·uⁱ·(1 − u)ⁿ⁻ⁱ;
    outside it goes on in a straight line with the slope that it has at the end. Derivative and
    value are sums of non-negative terms times the increments, so that neither loses digits.

    Parameters: a shift, then ``degree`` raw increments of the coefficients; zero is the identity.

    Attributes:
        degree: the polynomial's degree n.
        bound: half the length of the interval.
        min_slope: the least increment, relative to the identity's.

    Example:
        >>> import torch
        >>> polynomial = Bernstein(degree=5)
        >>> x, _ = polynomial.forward(torch.tensor([-9.0, 2.0]), torch.zeros(2, polynomial.size))
        >>> [round(value, 4) for value in x.tolist()]
        [-9.0, 2.0]
    """

    degree: int = 16
    bound: float = 5.0
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        if self.degree < 1 or not self.bound > 0 or not 0 < self.min_slope < 1:
            raise ValueError(
                "a Bernstein map needs degree >= 1, bound > 0 and min_slope between 0 and 1, got "
                f"degree={self.degree}, bound={self.bound}, min_slope={self.min_slope}"
            )

    @property
    def size(self) -> int:
        """A shift and the increments."""
        return self.degree + 1

    def curve(self, parameters: Tensor) -> Function:
        """The map, with its coefficients prepared."""
        degree, bound = self.degree, self.bound
        shift, raw = parameters[..., 0], parameters[..., 1:]
        # increments in units of the identity's, 2·bound/degree
        increments = self.min_slope + softplus(raw + unit_softplus_offset(self.min_slope))
        starts = torch.cumsum(increments, -1) - increments
        binomials = raw.new_tensor([math.comb(degree - 1, i) for i in range(degree)])

        def mapped(z: Tensor) -> Pair:
            place = z.clamp(-bound, bound)
            u = (place / bound + 1) / 2
            basis = binomials * _powers(u, degree) * _powers(1 - u, degree).flip(-1)
            u = u.unsqueeze(-1)
            slope = (basis * increments).sum(-1)
            # the basis of degree n is u and 1 − u times that of degree n − 1
            height = (basis * (starts + u * increments)).sum(-1)
            value = bound * (2 * height / degree - 1) + shift
            return value + slope * (z - place), torch.log(slope)

        return mapped


def _powers(u: Tensor, count: int) -> Tensor:
    """u⁰, u¹, …, by products: the second derivative of ``pow`` is not a number at zero."""
    powers = [torch.ones_like(u)]
    for _ in range(count - 1):
        powers.append(powers[-1] * u)
    return torch.stack(powers, -1)


@record
@dataclasses.dataclass(frozen=True)
class SumOfSquares(NumericMap):
    """The integral of a sum of squared polynomials (Jaini et al. 2019).

    On [−bound, bound], with t = z/bound, x = c + bound·∫₀ᵗ (m + (1 − m)·Σₖ pₖ(u)²) du, where m is
    ``min_slope``; outside it goes on in a straight line with the slope that it has at the end. The
    integral is Gauss–Legendre's with degree + 1 nodes, which is exact.

    Parameters: the constant c, then degree + 1 coefficients for each polynomial, which are added
    to constants of unequal size, so that zero is the identity and no two polynomials are twins.

    Attributes:
        polynomials: how many squares are summed.
        degree: the degree of each polynomial before it is squared.
        bound: half the length of the interval.
        min_slope: the least slope m.

    Example:
        >>> import torch
        >>> sos = SumOfSquares(polynomials=2, degree=3)
        >>> x, _ = sos.forward(torch.tensor([-9.0, 2.0]), torch.zeros(2, sos.size))
        >>> [round(value, 4) for value in x.tolist()]
        [-9.0, 2.0]
    """

    polynomials: int = 2
    degree: int = 4
    bound: float = 5.0
    min_slope: float = 1e-3
    rule: Rule = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.polynomials < 1 or self.degree < 0:
            raise ValueError(
                "a sum of squares needs polynomials >= 1 and degree >= 0, got "
                f"polynomials={self.polynomials}, degree={self.degree}"
            )
        if not self.bound > 0 or not 0 < self.min_slope < 1:
            raise ValueError(
                "a sum of squares needs bound > 0 and min_slope between 0 and 1, got "
                f"bound={self.bound}, min_slope={self.min_slope}"
            )
        object.__setattr__(self, "rule", gauss_legendre(self.degree + 1))

    @property
    def size(self) -> int:
        """The constant and the coefficients."""
        return 1 + self.polynomials * (self.degree + 1)

    def curve(self, parameters: Tensor) -> Function:
        """The map, with its coefficients prepared."""
        count, bound, least = self.polynomials, self.bound, self.min_slope
        shift = parameters[..., 0]
        coefficients = parameters[..., 1:].unflatten(-1, (count, self.degree + 1))
        # squares that sum to one and halve from one polynomial to the next
        total = sum(2.0**-k for k in range(count))
        constants = [math.sqrt(2.0**-k / total) for k in range(count)]
        first = parameters.new_tensor(constants)

        def slope(t: Tensor) -> Tensor:
            point = t.unsqueeze(-1)
            value = torch.zeros_like(point)
            for k in range(self.degree, 0, -1):
                value = (value + coefficients[..., k]) * point
            return least + (1 - least) * (value + coefficients[..., 0] + first).square().sum(-1)

        def mapped(z: Tensor) -> Pair:
            place = (z / bound).clamp(-1, 1)
            end = slope(place)
            value = shift + bound * integral(slope, place, self.rule)
            return value + end * (z - bound * place), torch.log(end)

        return mapped
