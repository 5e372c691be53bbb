"""Velocity fields on images: convolutions conditioned on time, and the network of them.

FFJORD's layers, all written as y = gate(t) ⊙ (W(t) * x) + shift(t, context), so that points and
tangents go through the same convolution.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.nets.fields import Field
from cnf.nets.smooth import Smooth
from cnf.nets.time import modulated
from cnf.registry import unknown_name

SIZE = 3
"""The width of every kernel."""


class ConvAffine(NamedTuple):
    """A convolution at given times: x ↦ gate ⊙ (W * x) + shift, on ``(rows, channels, h, w)``.

    Attributes:
        weight: ``(outputs, inputs, 3, 3)``, or ``(rows, outputs, inputs, 3, 3)``.
        gate: broadcasts over ``(rows, outputs, h, w)``, or None for ones.
        shift: broadcasts likewise.
        stride: 1, 2 to halve the image, -2 to double it by repeating pixels beforehand.
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor
    stride: int

    def apply(self, x: Tensor) -> Tensor:
        """Map points."""
        return self.linear(x) + self.shift

    def linear(self, u: Tensor) -> Tensor:
        """Map tangents: the same without the shift."""
        u = convolve(u, self.weight, self.stride)
        return u if self.gate is None else u * self.gate

    def repeated(self, count: int) -> ConvAffine:
        """The layer for ``count`` copies of its rows."""

        def repeat(tensor: Tensor, axes: int) -> Tensor:
            if tensor.dim() < axes or tensor.shape[0] == 1:
                return tensor
            return tensor.repeat(count, *[1] * (axes - 1))

        gate = None if self.gate is None else repeat(self.gate, 4)
        return ConvAffine(repeat(self.weight, 5), gate, repeat(self.shift, 4), self.stride)


class TimeConv(nn.Module, ABC):
    """One convolution of 3×3 pixels, whose coefficients depend on time.

    A context is added to the shift of every output channel.

    Args:
        inputs: channels before.
        outputs: channels after.
        stride: 1, 2 to halve height and width, -2 to double them.
        context_features: size of the context, 0 for none.
    """

    extra = 0
    """Channels that are concatenated to the input."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__()
        if stride not in (1, 2, -2):
            raise ValueError(f"a stride is 1, 2 (halving) or -2 (doubling), got {stride}")
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        layer = nn.Conv2d(inputs + self.extra, outputs, SIZE)
        self.weight, self.bias = layer.weight, nn.Parameter(layer.bias.detach())  # type: ignore[union-attr]
        self.from_context = (
            nn.Linear(context_features, outputs, bias=False) if context_features else None
        )

    @abstractmethod
    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, gate and shift at ``t``, a scalar or ``(rows,)``, for inputs like ``like``."""

    def at(self, t: Tensor, like: Tensor, context: Tensor | None) -> ConvAffine:
        """The layer at time ``t``, with what the context adds to its shift."""
        weight, gate, shift = self.coefficients(t, like)
        if self.from_context is not None and context is not None:
            shift = shift + pixels(self.from_context(context))
        return ConvAffine(weight, gate, shift, self.stride)

    def line(self) -> nn.Parameter:
        """A coefficient of time for every output channel."""
        return nn.Parameter(torch.empty(self.outputs).uniform_(-1, 1))

    def extra_repr(self) -> str:
        """The channels."""
        return f"{self.inputs}, {self.outputs}, stride={self.stride}"


class FiLMConv(nn.Module):
    """(1 + γ(c)) ⊙ layer + β(c): a context scales and shifts every channel, Perez et al. 2018.

    Args:
        layer: the convolution, which gets no context itself.
        context_features: size of the context.
    """

    def __init__(self, layer: TimeConv, context_features: int):
        super().__init__()
        self.layer = layer
        self.film = nn.Linear(context_features, 2 * layer.outputs)
        # at first the context changes nothing
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def at(self, t: Tensor, like: Tensor, context: Tensor | None) -> ConvAffine:
        """The layer at time ``t``, scaled and shifted."""
        affine = self.layer.at(t, like, None)
        if context is None:
            return affine
        gain, shift = (pixels(part) for part in self.film(context).chunk(2, -1))
        return modulated(affine, gain, shift)


class IgnoreConv(TimeConv):
    """W * x + b."""

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Constant in time."""
        return self.weight, None, pixels(self.bias)


class ConcatConv(TimeConv):
    """W * [x, t] + b, the time as one more channel; it shows the border through the padding."""

    extra = 1

    def planes(self, t: Tensor, like: Tensor) -> Tensor:
        """What is concatenated, ``(rows, extra, h, w)``."""
        return pixels(t.unsqueeze(-1)).expand(-1, 1, *like.shape[-2:])

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """A shift that is the convolution of the channels that are known."""
        weight, beside = self.weight.split([self.inputs, self.extra], 1)
        shift = convolve(self.planes(t, like), beside, self.stride)
        return weight, None, shift + pixels(self.bias)


class ConcatCoordConv(ConcatConv):
    """W * [x, t, row, column] + b, with coordinates from -1 to 1.

    Paper: Liu et al., "An intriguing failing of convolutional neural networks and the CoordConv
    solution", NeurIPS 2018.
    """

    extra = 3

    def planes(self, t: Tensor, like: Tensor) -> Tensor:
        """Time and coordinates."""
        time = super().planes(t, like)
        axes = [
            torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
            for size in like.shape[-2:]
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return torch.cat([time, grid.expand(time.shape[0], -1, -1, -1)], 1)


class ShiftConv(TimeConv):
    """W * x + b + h t, FFJORD's concat_v2: the time as a shift, the same at every pixel."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__(inputs, outputs, stride=stride, context_features=context_features)
        self.shift_slope = self.line()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """A shift linear in time."""
        shift = torch.addcmul(self.bias, self.shift_slope, t.unsqueeze(-1))
        return self.weight, None, pixels(shift)


class SquashConv(TimeConv):
    """(W * x + b) ⊙ σ(g t + c)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__(inputs, outputs, stride=stride, context_features=context_features)
        self.gate_slope, self.gate_bias = self.line(), self.line()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """A gate that opens and closes with time."""
        gate = torch.sigmoid(torch.addcmul(self.gate_bias, self.gate_slope, t.unsqueeze(-1)))
        return self.weight, pixels(gate), pixels(self.bias * gate)


class ConcatSquashConv(SquashConv):
    """(W * x + b) ⊙ σ(g t + c) + h t."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__(inputs, outputs, stride=stride, context_features=context_features)
        self.shift_slope = self.line()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """A gate and a shift that depend on time."""
        weight, gate, shift = super().coefficients(t, like)
        return weight, gate, shift + pixels(self.shift_slope * t.unsqueeze(-1))


class HyperConv(TimeConv):
    """W(t) * x + b(t): a small network of time puts out how far all numbers depart from W, b."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__(inputs, outputs, stride=stride, context_features=context_features)
        numbers = self.weight.numel() + outputs
        self.network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, numbers))

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weights and shifts from the network of time."""
        numbers = self.network(t.unsqueeze(-1))
        change, shift = numbers.split([self.weight.numel(), self.outputs], -1)
        return (
            self.weight + change.unflatten(-1, self.weight.shape),
            None,
            pixels(self.bias + shift),
        )


class BlendConv(TimeConv):
    """(1 - t) (W₀ * x + b₀) + t (W₁ * x + b₁)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, context_features: int = 0):
        super().__init__(inputs, outputs, stride=stride, context_features=context_features)
        self.end = IgnoreConv(inputs, outputs)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Between two convolutions, linearly in time."""
        shift = torch.addcmul(self.bias, self.end.bias - self.bias, t.unsqueeze(-1))
        change = self.end.weight - self.weight
        return self.weight + t.reshape(*t.shape, 1, 1, 1, 1) * change, None, pixels(shift)


TIME_CONVS: dict[str, type[TimeConv]] = {
    "ignore": IgnoreConv,
    "concat": ConcatConv,
    "concat_v2": ShiftConv,
    "squash": SquashConv,
    "concatsquash": ConcatSquashConv,
    "concatcoord": ConcatCoordConv,
    "hyper": HyperConv,
    "blend": BlendConv,
}


CONTEXTS = ("concat", "film")


class ConvField(Field):
    """A convolutional velocity field on images ``(channels, height, width)``.

    v(t, x) = Lₙ(t, φ(Lₙ₋₁(t, … φ(L₁(t, x))))), every L a convolution of 3×3 pixels.

    Args:
        channels: of the image and of the velocity.
        hidden: channels of the hidden layers.
        strides: one for each layer, the last included: 1, 2 halves height and width, -2 doubles
            them; together they must come back to the image's size. None means 1 for all.
        squeeze: let the layers work on blocks of 2×2 pixels as four times the channels.
        conditioning: ignore, concat, concat_v2, squash, concatsquash, concatcoord, hyper or blend.
        activation: tanh, softplus, silu, sine, gelu or swish, whose sharpness is learned.
        context_features: size of the context, 0 for none.
        context_by: ``"concat"`` shifts every layer's channels, ``"film"`` scales them, too.

    Paper: Grathwohl et al., "FFJORD", ICLR 2019.

    Example:
        >>> import torch
        >>> field = ConvField(1, (8, 8), strides=(2, 1, -2))
        >>> field(torch.tensor(0.5), torch.zeros(7, 1, 8, 8)).shape
        torch.Size([7, 1, 8, 8])
    """

    event_dims = 3

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        strides: Sequence[int] | None = None,
        squeeze: bool = False,
        conditioning: str = "concat",
        activation: str = "softplus",
        context_features: int = 0,
        context_by: str = "concat",
    ):
        super().__init__()
        if conditioning not in TIME_CONVS:
            raise unknown_name("time conditioning", conditioning, TIME_CONVS)
        if context_by not in CONTEXTS:
            raise unknown_name("way of conditioning images", context_by, dict.fromkeys(CONTEXTS))
        strides = tuple(strides or [1] * (len(hidden) + 1))
        if len(strides) != len(hidden) + 1 or strides.count(2) != strides.count(-2):
            raise ValueError(
                f"strides needs one number for each of the {len(hidden) + 1} layers and as many "
                f"halvings (2) as doublings (-2), got {strides}"
            )
        self.channels, self.activation, self.squeeze = channels, Smooth(activation), squeeze
        ends = channels * 4 if squeeze else channels
        film = context_by == "film" and context_features > 0
        shifted = 0 if film else context_features
        layers: list[nn.Module] = []
        for pair, stride in zip(itertools.pairwise((ends, *hidden, ends)), strides, strict=True):
            layer = TIME_CONVS[conditioning](*pair, stride=stride, context_features=shifted)
            layers.append(FiLMConv(layer, context_features) if film else layer)
        self.layers = nn.ModuleList(layers)
        depths = itertools.accumulate({1: 0, 2: 1, -2: -1}[stride] for stride in strides)
        self.divisor = 2 ** (max(0, *depths) + squeeze)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at images ``x``; ``t`` is a scalar or ``(*batch,)``."""
        return self._walk(t, x, context, None)[0]

    def push(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity and J·u for tangents u of ``(k, *batch, channels, height, width)``."""
        return self._walk(t, x, context, tangents)

    def _walk(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Points and tangents through every layer together; no tangents are an empty tensor."""
        shape = x.shape
        height, width = shape[-2:]
        if height % self.divisor or width % self.divisor:
            raise ValueError(
                f"this field halves its images to a {self.divisor}th, which {height}×{width} "
                "pixels do not allow"
            )
        batch, count = shape[:-3], 0 if tangents is None else len(tangents)
        x = x.reshape(-1, *shape[-3:])
        u = None if tangents is None else tangents.reshape(-1, *shape[-3:])
        if t.dim():
            t = t.expand(batch).reshape(-1)
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
        if self.squeeze:
            x = squeezed(x)
            u = None if u is None else squeezed(u)
        for i, layer in enumerate(self.layers):
            if i:
                x, slope = self.activation(x)
                if u is not None:
                    u = (u.unflatten(0, (count, -1)) * slope).flatten(0, 1)
            affine = layer.at(t, x, context)  # type: ignore[operator]
            x = affine.apply(x)
            if u is not None:
                u = affine.repeated(count).linear(u)
        if self.squeeze:
            x = unsqueezed(x)
            u = None if u is None else unsqueezed(u)
        pushed = x.new_empty(0) if u is None else u.reshape(count, *shape)
        return x.reshape(shape), pushed

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"squeeze={self.squeeze}"


def pixels(channels: Tensor) -> Tensor:
    """Numbers per channel ``(channels,)`` or ``(rows, channels)``, to be broadcast over pixels."""
    return channels.reshape(-1, channels.shape[-1], 1, 1)


def convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """3×3 convolution of ``(rows, channels, h, w)``, by one weight or by one for each row."""
    if stride < 0:
        x = x.repeat_interleave(-stride, -1).repeat_interleave(-stride, -2)
        stride = 1
    if weight.dim() == 4:
        return functional.conv2d(x, weight, stride=stride, padding=SIZE // 2)
    height, width = ((size - 1) // stride + 1 for size in x.shape[-2:])
    patches = functional.unfold(x, SIZE, padding=SIZE // 2, stride=stride)
    return (weight.flatten(2) @ patches).unflatten(-1, (height, width))


def squeezed(x: Tensor) -> Tensor:
    """Blocks of 2×2 pixels as channels; torch's own ``pixel_unshuffle`` fails on an empty batch."""
    blocks = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unsqueezed(x: Tensor) -> Tensor:
    """Undo ``squeezed``."""
    blocks = x.unflatten(1, (-1, 2, 2))
    return blocks.permute(0, 1, 4, 2, 5, 3).flatten(-2).flatten(-3, -2)
