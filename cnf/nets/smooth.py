"""Smooth activations of velocity fields: value, slope, and what a reverse pass needs of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.registry import unknown_name


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
    y = _tanh(h)
    return y, torch.addcmul(y.new_ones(()), y, y, value=-1)


def _tanh(h: Tensor) -> Tensor:
    # the compiler's own tanh takes longer than the product with a 64 x 64 matrix before it
    rational = torch.compiler.is_compiling() and h.dtype == torch.float32 and h.device.type == "cpu"
    return _RationalTanh.apply(h) if rational else torch.tanh(h)


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


class _RationalTanh(torch.autograd.Function):
    """``rational_tanh`` with the derivative of tanh."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        y = rational_tanh(h)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


def rational_tanh(h: Tensor) -> Tensor:
    """Tanh in float32, by sums and products alone; wrong by at most 4e-7 of its size.

    The odd rational function of degrees 13 and 6 that Eigen and XLA use, too.
    """
    # literals, because a compiler takes global numbers for variables
    h = h.clamp(-7.90531110763549805, 7.90531110763549805)
    numerator = (
        -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
        1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
    )  # fmt: skip
    denominator = (
        1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03
    )  # fmt: skip
    square = h * h
    return h * _polynomial(numerator, square) / _polynomial(denominator, square)


def _polynomial(weights: Sequence[float], x: Tensor) -> Tensor:
    """Σ wᵢ xⁿ⁻ⁱ, by Horner's rule."""
    total = weights[0] * x + weights[1]
    for weight in weights[2:]:
        total = total * x + weight
    return total


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
    "tanh": Formulas(_tanh, tanh, _pull_tanh_),
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
