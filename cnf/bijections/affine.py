"""Shifts and scales, with the bounds on the scale that the literature uses."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cnf.bijections.base import Pair, ScalarMap
from cnf.registry import record
from cnf.tanh import quick_tanh

SCALES = ("tanh", "softclip", "sigmoid", "softplus")


@record
@dataclasses.dataclass(frozen=True)
class Additive(ScalarMap):
    """x = z + b; volume-preserving (Dinh et al. 2015, NICE).

    Parameters: the shift b.

    Example:
        >>> import torch
        >>> Additive().forward(torch.tensor(1.0), torch.tensor([2.0]))
        (tensor(3.), tensor(0.))
    """

    @property
    def size(self) -> int:
        """One shift."""
        return 1

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """Z + b."""
        self.check(parameters)
        x = z + parameters[..., 0]
        return x, torch.zeros_like(x)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """X − b."""
        self.check(parameters)
        z = x - parameters[..., 0]
        return z, torch.zeros_like(z)


@record
@dataclasses.dataclass(frozen=True)
class Affine(ScalarMap):
    """x = z·exp(s(r)) + b (Dinh et al. 2017, RealNVP).

    Parameters: the shift b, then the raw scale r. The log-scale s is

    - ``"tanh"``: bound·tanh(r/bound), or r itself without a bound;
    - ``"softclip"``: r/(1 + |r/bound|), or r itself without a bound; zuko's, with bound = log 1000;
    - ``"sigmoid"``: log(sigmoid(r + 2) + 0.001), nflows' coupling; r = 0 is near the identity;
    - ``"softplus"``: log(softplus(r) + 0.001), nflows' autoregressive layer; the same.

    Attributes:
        bound: the largest |log-scale|, approached smoothly; None for none.
        scale: which of the forms above.

    Example:
        >>> import torch
        >>> x, log_derivative = Affine().forward(torch.tensor(3.0), torch.tensor([2.0, 0.5]))
        >>> round(x.item(), 3), log_derivative.item()
        (6.946, 0.5)
    """

    bound: float | None = None
    scale: str = "tanh"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"bound must be positive or None, got {self.bound}")
        if self.bound is not None and self.scale in ("sigmoid", "softplus"):
            raise ValueError(f"scale={self.scale!r} takes no bound, got {self.bound}")

    @property
    def size(self) -> int:
        """A shift and a raw scale."""
        return 2

    def log_scale(self, raw: Tensor) -> Tensor:
        """The log-scale s(r) in nats, shaped like r."""
        if self.scale == "sigmoid":
            return torch.log(torch.sigmoid(raw + 2) + 1e-3)
        if self.scale == "softplus":
            return torch.log(softplus(raw) + 1e-3)
        if self.bound is None:
            return raw
        return soft_bound(raw, self.bound, self.scale)

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """z·exp(s) + b."""
        self.check(parameters)
        shift, raw = parameters.unbind(-1)
        log_scale = self.log_scale(raw)
        x = torch.addcmul(shift, z, torch.exp(log_scale))
        return x, log_scale.expand_as(x)

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """(x − b)·exp(−s)."""
        self.check(parameters)
        shift, raw = parameters.unbind(-1)
        log_derivative = -self.log_scale(raw)
        z = (x - shift) * torch.exp(log_derivative)
        return z, log_derivative.expand_as(z)


def soft_bound(raw: Tensor, bound: float, form: str = "tanh") -> Tensor:
    """Squash numbers into (−bound, bound), with slope one at zero.

    >>> soft_bound(torch.tensor([0.0, 3.0, 1e9]), 3.0, "softclip")
    tensor([0.0000, 1.5000, 3.0000])
    """
    if form == "softclip":
        return raw / (1 + (raw / bound).abs())
    return bound * quick_tanh(raw / bound)


def unit_softplus_offset(minimum: float) -> float:
    """The c for which minimum + softplus(c) = 1.

    >>> round(unit_softplus_offset(0.0), 6)
    0.541325
    """
    return math.log(math.expm1(1 - minimum))
