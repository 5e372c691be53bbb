"""Smooth activations of velocity fields: value, slope, and what a reverse pass needs of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnf.registry import unknown_name
from cnf.tanh import quick_tanh


class Formulas(NamedTuple):
    """An activation φ.

    Attributes:
        value: φ(h).
        linearize: φ(h) and φ'(h).
        pull_: from (a, b, h, φ, φ') it makes a, in place, a φ' + b φ'': the gradient of h that
            comes from a gradient ``a`` of the value and ``b`` of the slope.
    """

    value: Callable[[Tensor], Tensor]
    linearize: Callable[[Tensor], tuple[Tensor, Tensor]]
    pull_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def tanh(h: Tensor) -> tuple[Tensor, Tensor]:
    """Hyperbolic tangent and its slope."""
    y = quick_tanh(h)
    return y, torch.addcmul(y.new_ones(()), y, y, value=-1)


def softplus(h: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + eʰ) and its slope."""
    # torch's softplus is cut off at 20, where it would not fit its slope
    return -nn.functional.logsigmoid(-h), torch.sigmoid(h)


def silu(h: Tensor) -> tuple[Tensor, Tensor]:
    """H σ(h) and its slope."""
    gate = torch.sigmoid(h)
    y = h * gate
    return y, gate + y * (1 - gate)


def sine(h: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and its slope."""
    return torch.sin(h), torch.cos(h)


def gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    """H Φ(h) and its slope."""
    normal = 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return h * normal, normal + h * _bell(h)


def _pull_tanh_(a: Tensor, b: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return a.addcmul_(b, y, value=-2).mul_(slope)


def _pull_softplus_(a: Tensor, b: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return a.addcmul_(b, 1 - slope).mul_(slope)


def _pull_silu_(a: Tensor, b: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    gate = torch.sigmoid(h)
    return a.mul_(slope).addcmul_(b, gate * (1 - gate) * (2 + h * (1 - 2 * gate)))


def _pull_sine_(a: Tensor, b: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return a.mul_(slope).addcmul_(b, y, value=-1)


def _pull_gelu_(a: Tensor, b: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return a.mul_(slope).addcmul_(b, _bell(h) * (2 - h.square()))


def _bell(h: Tensor) -> Tensor:
    return torch.exp(-0.5 * h.square()) / math.sqrt(2 * math.pi)


SMOOTH: dict[str, Formulas] = {
    "tanh": Formulas(quick_tanh, tanh, _pull_tanh_),
    "softplus": Formulas(nn.functional.softplus, softplus, _pull_softplus_),
    "silu": Formulas(nn.functional.silu, silu, _pull_silu_),
    "sine": Formulas(torch.sin, sine, _pull_sine_),
    "gelu": Formulas(nn.functional.gelu, gelu, _pull_gelu_),
}


class Smooth(nn.Module):
    """An activation with its slope, by name: one of ``SMOOTH``, or ``"swish"``, h σ(β h).

    The β of swish is learned, and every object has its own: no two networks share it.

    Example:
        >>> import torch
        >>> value, slope = Smooth("swish")(torch.tensor(0.0))
        >>> value.item(), slope.item()
        (0.0, 0.5)
    """

    def __init__(self, name: str):
        super().__init__()
        if name != "swish" and name not in SMOOTH:
            raise unknown_name("smooth activation", name, {**SMOOTH, "swish": None})
        self.name = name
        self.beta = nn.Parameter(torch.ones(())) if name == "swish" else None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The activation and its slope."""
        if self.beta is None:
            return SMOOTH[self.name].linearize(h)
        gate = torch.sigmoid(self.beta * h)
        y = h * gate
        return y, gate + self.beta * y * (1 - gate)

    def value(self, h: Tensor) -> Tensor:
        """The activation alone."""
        return SMOOTH[self.name].value(h) if self.beta is None else h * torch.sigmoid(self.beta * h)

    def extra_repr(self) -> str:
        """Its name."""
        return self.name
