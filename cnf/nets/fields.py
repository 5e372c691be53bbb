"""Velocity fields v(t, x, context), with their Jacobian products from the same pass.

A field is any module with ``forward(t, x, context)``, where ``t`` is a scalar, or one time per
sample. The fields here also offer ``push`` (J·u for given u) and ``trace`` (tr J): they know their
own layers, so that value and tangents go through each layer together and nothing is traced twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnf.nets.time import TIME_LAYERS
from cnf.registry import unknown_name

Activation = Callable[[Tensor], tuple[Tensor, Tensor]]


def tanh(h: Tensor) -> tuple[Tensor, Tensor]:
    """Hyperbolic tangent and its slope."""
    y = torch.tanh(h)
    return y, 1 - y.square()


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
    return h * normal, normal + h * torch.exp(-0.5 * h.square()) / math.sqrt(2 * math.pi)


SMOOTH: dict[str, Activation] = {
    "tanh": tanh,
    "softplus": softplus,
    "silu": silu,
    "sine": sine,
    "gelu": gelu,
}

#: The same activations without their slopes: what a velocity alone needs.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "silu": nn.functional.silu,
    "sine": torch.sin,
    "gelu": nn.functional.gelu,
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
            return SMOOTH[self.name](h)
        gate = torch.sigmoid(self.beta * h)
        y = h * gate
        return y, gate + self.beta * y * (1 - gate)

    def value(self, h: Tensor) -> Tensor:
        """The activation alone."""
        return VALUES[self.name](h) if self.beta is None else h * torch.sigmoid(self.beta * h)

    def extra_repr(self) -> str:
        """Its name."""
        return self.name


class Field(nn.Module, ABC):
    """A velocity field whose gradients reach its own parameters, x and the context, no others.

    Attributes:
        event_dims: how many trailing axes of x make one event.
        couples_batch: whether the velocity of one sample may depend on another, which no density
            has room for; fields that do not say so are tried before each solve.
    """

    event_dims: int = 1
    couples_batch: bool = False

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at ``x`` of ``(*batch, *event)``; ``t`` is a scalar or ``(*batch,)``."""


class TimeMLP(Field):
    """A multilayer perceptron of time-conditioned linear layers.

    v(t, x) = Lₙ(t, φ(Lₙ₋₁(t, … φ(L₁(t, x)))))

    Args:
        features: D, the size of x and of the velocity.
        hidden: sizes of the hidden layers.
        conditioning: the kind of layer: ignore, concat, concat_v2, squash, concatsquash,
            concatcoord, hyper or blend.
        activation: tanh, softplus, silu, sine, gelu or swish, see ``Smooth``; smooth, because
            solvers are only as good as the field is smooth.
        context_features: size of the context, 0 for none.

    Paper: Grathwohl et al., "FFJORD", ICLR 2019.

    Example:
        >>> import torch
        >>> field = TimeMLP(2, (16, 16))
        >>> field(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        conditioning: str = "concatsquash",
        activation: str = "tanh",
        context_features: int = 0,
    ):
        super().__init__()
        if conditioning not in TIME_LAYERS:
            raise unknown_name("time conditioning", conditioning, TIME_LAYERS)
        self.features, self.activation = features, Smooth(activation)
        self.layers = TIME_LAYERS[conditioning](
            (features, *hidden, features), context_features=context_features
        )

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at ``(*batch, features)``."""
        *inner, last = self.layers.at(t, context)
        activate = self.activation.value
        for affine in inner:
            x = activate(affine.apply(x))
        return last.apply(x)

    def push(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity and J·u for tangents u of ``(k, *batch, features)``."""
        *inner, last = self.layers.at(t, context)
        activate = self.activation
        for affine in inner:
            x, slope = activate(affine.apply(x))
            tangents = affine.linear(tangents) * slope
        return last.apply(x), last.linear(tangents)

    def trace(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The velocity and tr J at one scalar time, without forming J."""
        *inner, last = self.layers.at(t, context)
        activate = self.activation
        slopes = []
        for affine in inner:
            x, slope = activate(affine.apply(x))
            slopes.append(slope)
        weights = [affine.weight for affine in (*inner, last)]
        return last.apply(x), trace_of_product(weights, slopes).expand(x.shape[:-1])

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"{self.layers.sizes}"


def trace_of_product(weights: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """tr(Wₙ Sₙ₋₁ Wₙ₋₁ … S₁ W₁) with S = diag(slopes), one trace per sample.

    The trace is cyclic: with M = W₁ Wₙ, which no sample enters, the columns to push are either the
    D of W₁ through n - 2 layers or the H of W₂ S₁ through n - 3, whichever is less work. One hidden
    layer needs no product at all and two need a single one, whatever D is.

    Args:
        weights: n matrices, ``(out, in)``.
        slopes: n - 1 tensors, ``(*batch, out)``.
    """
    first, last = weights[0], weights[-1]
    if len(weights) == 1:
        return first.diagonal().sum()
    if len(weights) == 2:
        return slopes[0] @ (first * last.T).sum(-1)
    cycle = first @ last
    if len(weights) == 3:
        return ((slopes[0] @ (weights[1] * cycle.T).T) * slopes[1]).sum(-1)
    columns, width, depth = first.shape[1], first.shape[0], len(weights)
    if columns * (depth - 2) <= width * (depth - 3):
        start, rest, close = 0, first.T, last
        carry = rest.reshape(columns, *[1] * (slopes[0].dim() - 1), width)
    else:
        start, close = 1, cycle
        rest = weights[1].T.reshape(width, *[1] * (slopes[0].dim() - 1), -1)
        carry = rest * slopes[0].movedim(-1, 0).unsqueeze(-1)
    for weight, slope in zip(weights[start + 1 : -1], slopes[start:], strict=False):
        carry = (carry * slope) @ weight.T
    close = close.reshape(close.shape[0], *[1] * (slopes[0].dim() - 1), close.shape[1])
    return ((carry * close).sum(0) * slopes[-1]).sum(-1)
