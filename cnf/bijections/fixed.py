"""Scalar maps without parameters."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cnf.bijections.base import Pair, ScalarMap
from cnf.compiling import expm1
from cnf.registry import record


class FixedMap(ScalarMap):
    """A scalar map of size 0; it may be called without parameters."""

    @property
    def size(self) -> int:
        """None."""
        return 0

    @abstractmethod
    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """Map z to x."""

    @abstractmethod
    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """Map x to z."""


def interior(value: Tensor, lower: float, upper: float) -> Tensor:
    """The value moved into the open interval, by next to nothing in its dtype."""
    information = torch.finfo(value.dtype)
    low = information.tiny if lower == 0 else lower + _spacing(-lower, information.eps)
    high = upper - _spacing(upper, information.eps) if upper < math.inf else information.max
    return value.clamp(low, -information.tiny if upper == 0 else high)


def _spacing(end: float, eps: float) -> float:
    """What moves an upper end to a number below it, whichever way the dtype rounds the end."""
    return eps / 2 if end == 1 else eps * abs(end)


def _supported(value: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """The value moved into the open interval, and whether it was inside."""
    return interior(value, lower, upper), (value > lower) & (value < upper)


def _masked(log_derivative: Tensor, inside: Tensor) -> Tensor:
    """The log-derivative, −inf outside the support."""
    return torch.where(inside, log_derivative, -math.inf)


@record
@dataclasses.dataclass(frozen=True)
class FixedAffine(FixedMap):
    """x = scale·z + shift with numbers that are not learned.

    Attributes:
        shift: what is added.
        scale: what is multiplied by, positive.

    Example:
        >>> import torch
        >>> FixedAffine(shift=1.0, scale=2.0).forward(torch.tensor(3.0))
        (tensor(7.), tensor(0.6931))
    """

    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """scale·z + shift."""
        return self.scale * z + self.shift, torch.full_like(z, math.log(self.scale))

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """(x − shift)/scale."""
        return (x - self.shift) / self.scale, torch.full_like(x, -math.log(self.scale))


@record
@dataclasses.dataclass(frozen=True)
class LeakyReLU(FixedMap):
    """x = z for z ≥ 0, slope·z below.

    Attributes:
        slope: the slope below zero, positive.

    Example:
        >>> import torch
        >>> LeakyReLU(slope=0.5).forward(torch.tensor([-2.0, 2.0]))[0]
        tensor([-1.,  2.])
    """

    slope: float = 0.01

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope must be positive, got {self.slope}")

    def _bend(self, value: Tensor, slope: float) -> Pair:
        below = value < 0
        log_derivative = torch.where(below, math.log(slope), torch.zeros_like(value))
        return torch.where(below, slope * value, value), log_derivative

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """Bend by the slope."""
        return self._bend(z, self.slope)

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """Bend by 1/slope."""
        return self._bend(x, 1 / self.slope)


@record
@dataclasses.dataclass(frozen=True)
class Sigmoid(FixedMap):
    """x = (sigmoid(z) − margin)/(1 − 2·margin), onto an interval a little wider than [0, 1].

    Its inverse is logit(margin + (1 − 2·margin)·x), which brings data from [0, 1], such as
    dequantised pixels, to the whole line (Dinh et al. 2017).

    Attributes:
        margin: keeps data at 0 and 1 away from the ends; 0 for the plain sigmoid.

    Example:
        >>> import torch
        >>> Sigmoid().inverse(torch.tensor([0.5, 2.0]))[1]
        tensor([1.3863,   -inf])
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"margin must lie in [0, 0.5), got {self.margin}")
        edge = self.margin / (1 - 2 * self.margin)
        object.__setattr__(self, "codomain", (-edge, 1 + edge))

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """The squashed value."""
        span = 1 - 2 * self.margin
        log_derivative = logsigmoid(z) + logsigmoid(-z) - math.log(span)
        return interior((torch.sigmoid(z) - self.margin) / span, *self.codomain), log_derivative

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """The logit; −inf for the log-derivative outside the codomain."""
        span = 1 - 2 * self.margin
        x, inside = _supported(x, *self.codomain)
        share = interior(self.margin + span * x, 0.0, 1.0)  # rounding may have left it
        high, low = torch.log(share), torch.log1p(-share)
        return high - low, _masked(math.log(span) - high - low, inside)


@record
@dataclasses.dataclass(frozen=True)
class Logit(FixedMap):
    """x = logit(margin + (1 − 2·margin)·z): ``Sigmoid`` the other way round.

    Attributes:
        margin: keeps values at 0 and 1 away from the ends.

    Example:
        >>> import torch
        >>> Logit().forward(torch.tensor(0.5))
        (tensor(0.), tensor(1.3863))
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain", Sigmoid(self.margin).codomain)

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """The logit; −inf for the log-derivative outside the domain."""
        return Sigmoid(self.margin).inverse(z)

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """The squashed value."""
        return Sigmoid(self.margin).forward(x)


@record
@dataclasses.dataclass(frozen=True)
class Softplus(FixedMap):
    """x = log(1 + exp(z)), onto the positive numbers.

    Example:
        >>> import torch
        >>> Softplus().forward(torch.tensor(0.0))
        (tensor(0.6931), tensor(-0.6931))
    """

    codomain = (0.0, math.inf)

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """log(1 + exp(z)), by the log-sigmoid: torch's softplus is cut off at 20."""
        return interior(-logsigmoid(-z), *self.codomain), logsigmoid(z)

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """X + log(1 − exp(−x)); −inf for the log-derivative of what is not positive."""
        x, inside = _supported(x, *self.codomain)
        gap = torch.log(-expm1(-x))
        return x + gap, _masked(-gap, inside)


@record
@dataclasses.dataclass(frozen=True)
class Exp(FixedMap):
    """x = exp(z), onto the positive numbers.

    Example:
        >>> import torch
        >>> Exp().inverse(torch.tensor(1.0))
        (tensor(0.), tensor(-0.))
    """

    codomain = (0.0, math.inf)

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """exp(z)."""
        return interior(torch.exp(z), *self.codomain), z

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """log(x); −inf for the log-derivative of what is not positive."""
        x, inside = _supported(x, *self.codomain)
        z = torch.log(x)
        return z, _masked(-z, inside)


@record
@dataclasses.dataclass(frozen=True)
class Tanh(FixedMap):
    """x = tanh(z), onto (−1, 1).

    Example:
        >>> import torch
        >>> Tanh().inverse(torch.tensor([0.0, -1.5]))
        (tensor([ 0.0000, -8.6643]), tensor([0., -inf]))
    """

    codomain = (-1.0, 1.0)

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """tanh(z), with log sech² from the log-sigmoids."""
        log_derivative = logsigmoid(2 * z) + logsigmoid(-2 * z) + math.log(4)
        return interior(torch.tanh(z), *self.codomain), log_derivative

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """artanh(x); −inf for the log-derivative outside (−1, 1)."""
        x, inside = _supported(x, *self.codomain)
        return torch.atanh(x), _masked(-torch.log1p(-x) - torch.log1p(x), inside)


@record
@dataclasses.dataclass(frozen=True)
class Power(FixedMap):
    """x = z^exponent on the positive numbers.

    Attributes:
        exponent: positive.

    Example:
        >>> import torch
        >>> Power(2.0).forward(torch.tensor([3.0, -3.0]))[1]
        tensor([1.7918,   -inf])
    """

    exponent: float = 2.0
    domain = (0.0, math.inf)
    codomain = (0.0, math.inf)

    def __post_init__(self) -> None:
        if not self.exponent > 0:
            raise ValueError(f"exponent must be positive, got {self.exponent}")

    def _raise(self, value: Tensor, exponent: float) -> Pair:
        value, inside = _supported(value, *self.domain)
        log_derivative = math.log(exponent) + (exponent - 1) * torch.log(value)
        return interior(value.pow(exponent), *self.codomain), _masked(log_derivative, inside)

    def forward(self, z: Tensor, parameters: Tensor | None = None) -> Pair:
        """z^exponent; −inf for the log-derivative of what is not positive."""
        return self._raise(z, self.exponent)

    def inverse(self, x: Tensor, parameters: Tensor | None = None) -> Pair:
        """x^(1/exponent); −inf for the log-derivative of what is not positive."""
        return self._raise(x, 1 / self.exponent)
