"""Convolutional networks that condition couplings of images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.nets.activations import activation as make_activation
from cnf.nets.mlp import required


class _Frame(nn.Module):
    """A 3×3 convolution in, a body, a 3×3 convolution of zeros out.

    A context is added to the first layer's outputs, as if it were concatenated to its inputs at
    every pixel (away from the border). Images may have any batch axes.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        widths: tuple[int, int],
        body: nn.Module,
        context_features: int,
        zero_last: bool,
    ):
        super().__init__()
        self.context_features = context_features
        self.first = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.from_context = (
            nn.Linear(context_features, widths[0], bias=False) if context_features else None
        )
        self.body = body
        self.last = nn.Conv2d(widths[1], outputs, 3, padding=1)
        if zero_last:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images to images of the same size.

        Args:
            x: ``(*batch, inputs, height, width)``.
            context: ``(*batch, context_features)``.

        Returns:
            ``(*batch, outputs, height, width)``.

        Raises:
            ValueError: if the network was built with a context and gets none, or x is no image.
        """
        if x.dim() < 3 or x.shape[-3] != self.first.in_channels:
            raise ValueError(
                f"expected (*batch, {self.first.in_channels}, height, width), got {tuple(x.shape)}"
            )
        batch = x.shape[:-3]
        hidden = self.first(x.reshape(math.prod(batch), *x.shape[-3:]))
        if self.from_context is not None:
            context = required(context, self.context_features)
            shift = self.from_context(context).expand(*batch, hidden.shape[1])
            hidden = hidden + shift.reshape(*hidden.shape[:2], 1, 1)
        out = self.last(self.body(hidden))
        return out.reshape(*batch, *out.shape[1:])


class ConvNet(_Frame):
    """Glow's conditioner: a 3×3 convolution, 1×1 convolutions, a 3×3 convolution of zeros.

    Glow (Kingma & Dhariwal 2018) normalises its hidden layers by their first batch; here they are
    plain, so that nothing but the flow itself takes numbers from data.

    Args:
        inputs: channels of x.
        outputs: channels of the result.
        hidden: channels of the hidden layers, at least one; Glow's are (512, 512).
        context_features: the last axis of the context; 0 for none, and what is given is ignored.
        activation: a name from ``cnf.nets.activations``.
        zero_last: start with a last layer of zeros, so that a flow starts as the identity.

    Example:
        >>> import torch
        >>> ConvNet(3, 6, hidden=(16, 16))(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 6, 8, 8])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        zero_last: bool = True,
    ):
        _check_widths(hidden)
        layers: list[nn.Module] = [make_activation(activation)]
        for before, after in itertools.pairwise(hidden):
            layers += [nn.Conv2d(before, after, 1), make_activation(activation)]
        widths = hidden[0], hidden[-1]
        body = nn.Sequential(*layers)
        super().__init__(inputs, outputs, widths, body, context_features, zero_last)


class ResNet(_Frame):
    """Residual blocks h + L₂(a(L₁(a(h)))) of 3×3 convolutions, RealNVP's kind of conditioner.

    Dinh et al. 2017 normalise batches and weights in the blocks; here they are plain, and begin as
    the identity (L₂ = 0), which keeps deep ones trainable.

    Args:
        inputs: channels of x.
        outputs: channels of the result.
        hidden: channels of each block, all of one width; RealNVP has four blocks of 64 on CIFAR-10.
        context_features: the last axis of the context; 0 for none, and what is given is ignored.
        activation: a name from ``cnf.nets.activations``.
        zero_last: start with a last layer of zeros, so that a flow starts as the identity.

    Example:
        >>> import torch
        >>> net = ResNet(1, 2, hidden=(8, 8), context_features=3)
        >>> net(torch.randn(1, 4, 4), torch.randn(3)).shape
        torch.Size([2, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: str = "relu",
        zero_last: bool = True,
    ):
        width = _one_width(hidden)
        body = nn.Sequential(
            *[_ResidualBlock(width, activation) for _ in hidden], make_activation(activation)
        )
        super().__init__(inputs, outputs, (width, width), body, context_features, zero_last)


class GatedAttention(_Frame):
    """Flow++'s conditioner: blocks of a gated convolution and a gated self-attention over pixels.

    Each block is h ← norm(h + gate(conv(h))), then h ← norm(h + gate(attend(h + positions))), with
    gate(a, b) = a ⊙ sigmoid(b) and a norm over the channels of each pixel. Ho et al. 2019,
    https://arxiv.org/abs/1902.00275; without its dropout, which would make densities random.

    Args:
        inputs: channels of x.
        outputs: channels of the result.
        size: (height, width) of the images, for the learned positions.
        hidden: channels of each block, all of one width; Flow++ has ten blocks of 96 on CIFAR-10.
        heads: of the attention; Flow++ has 4.
        context_features: the last axis of the context; 0 for none, and what is given is ignored.
        activation: a name from ``cnf.nets.activations``.
        zero_last: start with a last layer of zeros, so that a flow starts as the identity.

    Example:
        >>> import torch
        >>> GatedAttention(1, 2, (4, 4), hidden=(8, 8), heads=2)(torch.randn(5, 1, 4, 4)).shape
        torch.Size([5, 2, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int],
        *,
        hidden: Sequence[int] = (32, 32),
        heads: int = 4,
        context_features: int = 0,
        activation: str = "elu",
        zero_last: bool = True,
    ):
        width = _one_width(hidden)
        if heads < 1 or width % heads:
            raise ValueError(f"{width} channels cannot be divided among heads={heads}")
        blocks = [_AttentionBlock(width, size, heads, activation) for _ in hidden]
        body = nn.Sequential(*blocks)
        super().__init__(inputs, outputs, (width, width), body, context_features, zero_last)


class _ResidualBlock(nn.Module):
    """h + L₂(a(L₁(a(h))))."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.activation = make_activation(activation)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        for parameter in self.layers[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, width, height, width)`` to the same shape."""
        change = hidden
        for layer in self.layers:
            change = layer(self.activation(change))
        return hidden + change


class _AttentionBlock(nn.Module):
    """A gated convolution and a gated attention, each added and normalised."""

    def __init__(self, width: int, size: tuple[int, int], heads: int, activation: str):
        super().__init__()
        self.heads = heads
        self.activation = make_activation(activation)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.gate = nn.Linear(width, 2 * width)
        self.positions = nn.Parameter(torch.zeros(*size, width))
        self.queries = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, 2 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, width, height, width)`` to the same shape."""
        change = _channels_last(self.convolution(self.activation(hidden)))
        hidden = _channels_last(hidden)
        gated = nn.functional.glu(self.gate(self.activation(change)), -1)
        hidden = self.norms[0](hidden + gated)
        gated = nn.functional.glu(self.attended(self._attend(hidden)), -1)
        return self.norms[1](hidden + gated).movedim(-1, 1)

    def _attend(self, hidden: Tensor) -> Tensor:
        """Let every pixel look at all, ``(batch, height, width, channels)``."""
        pixels = (hidden + self.positions).flatten(1, 2)
        split = self.queries(pixels).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        return seen.transpose(1, 2).reshape(hidden.shape)


def _channels_last(images: Tensor) -> Tensor:
    """Channels in the last axis, in a copy: compilers may be wrong on a convolution's strides."""
    return images.movedim(1, -1).clone(memory_format=torch.contiguous_format)


def _check_widths(hidden: Sequence[int]) -> None:
    if len(hidden) == 0 or any(width < 1 for width in hidden):
        raise ValueError(f"hidden must name positive numbers of channels, got {tuple(hidden)}")


def _one_width(hidden: Sequence[int]) -> int:
    _check_widths(hidden)
    if len(set(hidden)) > 1:
        raise ValueError(f"blocks need one width for all, got hidden={tuple(hidden)}")
    return hidden[0]
