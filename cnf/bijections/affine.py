"""Shifts and scales, with the bounds on the scale that the literature uses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from cnf.arrays import Array
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

    def log_scale(self, raw: Tensor, sign: int = 1) -> Tensor:
        """The log-scale s(r) in nats, shaped like r; or −s(r)."""
        if self.scale == "tanh" and self.bound is not None:
            return _times(quick_tanh(raw / self.bound, reuse=True), sign * self.bound)
        if self.scale == "sigmoid":
            raw = torch.log(torch.sigmoid(raw + 2) + 1e-3)
        elif self.scale == "softplus":
            raw = torch.log(softplus(raw) + 1e-3)
        elif self.bound is not None:
            raw = soft_bound(raw, self.bound, self.scale)
        return raw if sign > 0 else -raw

    def forward(self, z: Tensor, parameters: Tensor) -> Pair:
        """z·exp(s) + b."""
        self.check(parameters)
        shift, raw = split_parameters(parameters)
        log_scale = self.log_scale(raw)
        x = torch.addcmul(shift, z, torch.exp(log_scale))
        return x, _like(log_scale, x)

    def forward_array(self, z: Array, parameters: Array) -> tuple[Array, Array]:
        """z·exp(s) + b, without a gradient; s takes the memory of r."""
        if self.scale != "tanh":
            return super().forward_array(z, parameters)
        shift, log_scale = parameters[..., 0], parameters[..., 1]
        if self.bound is not None:
            # NumPy takes as long to make an array of a number as to compute some hundreds
            bound = np.asarray(self.bound, log_scale.dtype)
            np.divide(log_scale, bound, out=log_scale)
            np.tanh(log_scale, out=log_scale)
            np.multiply(log_scale, bound, out=log_scale)
        x = np.exp(log_scale)
        x *= z
        x += shift
        return x, log_scale

    def inverse(self, x: Tensor, parameters: Tensor) -> Pair:
        """(x − b)·exp(−s)."""
        self.check(parameters)
        shift, raw = split_parameters(parameters)
        log_derivative = self.log_scale(raw, sign=-1)
        z = _times(x - shift, torch.exp(log_derivative))
        return z, _like(log_derivative, z)


def split_parameters(parameters: Tensor) -> tuple[Tensor, ...]:
    """Each parameter for itself."""
    # compiled networks keep those of a kind side by side, and so their gradients go back
    together = parameters.dim() > 1 and torch.compiler.is_compiling()
    return parameters.mT.unbind(-2) if together else parameters.unbind(-1)


def _times(fresh: Tensor, factor: Tensor | float) -> Tensor:
    """A product, in the memory of its first factor where no gradient is wanted."""
    # a compiler knows itself what it need not keep
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return fresh * factor
    return fresh.mul_(factor)


def _like(values: Tensor, other: Tensor) -> Tensor:
    return values if values.shape == other.shape else values.expand_as(other)


def soft_bound(raw: Any, bound: float, form: str = "tanh") -> Any:
    """Squash numbers into (−bound, bound), with slope one at zero; ``"softclip"`` arrays, too.

    >>> soft_bound(torch.tensor([0.0, 3.0, 1e9]), 3.0, "softclip")
    tensor([0.0000, 1.5000, 3.0000])
    """
    if form == "softclip":
        return raw / (1 + abs(raw / bound))
    return bound * quick_tanh(raw / bound)


def unit_softplus_offset(minimum: float) -> float:
    """The c for which minimum + softplus(c) = 1.

    >>> round(unit_softplus_offset(0.0), 6)
    0.541325
    """
    return math.log(math.expm1(1 - minimum))
