"""A field for wide tables: residual blocks that time and context modulate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cnf.nets.fields import Field
from cnf.nets.smooth import Smooth


class FourierTime(nn.Module):
    """t ↦ (t, sin πkt, cos πkt for k = 1 … frequencies), ``(*shape,)`` to ``(*shape, outputs)``.

    Example:
        >>> import torch
        >>> FourierTime(1)(torch.tensor(0.5)).shape
        torch.Size([3])
    """

    def __init__(self, frequencies: int):
        super().__init__()
        if frequencies < 1:
            raise ValueError(f"at least one frequency is needed, got {frequencies}")
        self.frequencies, self.outputs = frequencies, 2 * frequencies + 1

    def forward(self, t: Tensor) -> Tensor:
        """The features of each time."""
        t = t.unsqueeze(-1)
        k = torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        return torch.cat([t, torch.sin(math.pi * k * t), torch.cos(math.pi * k * t)], -1)


class Block(nn.Module):
    """h + W₂ φ((1 + γ) ⊙ (W₁ h + b₁) + β) + b₂, with γ and β from the embedding (FiLM)."""

    def __init__(self, width: int, embedding: int, activation: str):
        super().__init__()
        self.activation = Smooth(activation)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.film = nn.Linear(embedding, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(
        self, h: Tensor, tangents: Tensor | None, embedding: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Points, and tangents of ``(k, *batch, width)`` if there are any."""
        gain, shift = self.film(embedding).chunk(2, -1)
        gain = 1 + gain
        y, slope = self.activation(gain * self.first(h) + shift)
        if tangents is not None:
            inner = slope * gain * nn.functional.linear(tangents, self.first.weight)
            tangents = tangents + nn.functional.linear(inner, self.second.weight)
        return h + self.second(y), tangents


class ResidualField(Field):
    """A residual network for vectors, modulated by Fourier features of time and by the context.

    v(t, x) = W_out φ(Bₙ(… B₁(W_in x))); every block is scaled and shifted by what a small network
    makes of time and context together (FiLM, Perez et al. 2018). It starts as v = 0.

    Args:
        features: D, the size of x and of the velocity.
        width: the size of the blocks.
        blocks: how many.
        frequencies: sines and cosines of time.
        embedding: the size of what time and context are turned into.
        activation: tanh, softplus, silu, sine, gelu or swish, whose sharpness is learned.
        context_features: size of the context, 0 for none.

    Example:
        >>> import torch
        >>> field = ResidualField(8, 32, context_features=3)
        >>> field(torch.rand(7), torch.zeros(7, 8), torch.zeros(7, 3)).shape
        torch.Size([7, 8])
    """

    def __init__(
        self,
        features: int,
        width: int = 128,
        blocks: int = 3,
        *,
        frequencies: int = 4,
        embedding: int = 64,
        activation: str = "silu",
        context_features: int = 0,
    ):
        super().__init__()
        self.features, self.activation = features, Smooth(activation)
        self.time = FourierTime(frequencies)
        self.embed = nn.Sequential(
            nn.Linear(self.time.outputs + context_features, embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
            nn.SiLU(),
        )
        self.enter = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, embedding, activation) for _ in range(blocks))
        self.leave = nn.Linear(width, features)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at ``(*batch, features)``; ``t`` is a scalar or ``(*batch,)``."""
        return self._walk(t, x, context, None)[0]

    def push(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity and J·u for tangents u of ``(k, *batch, features)``."""
        return self._walk(t, x, context, tangents)

    def _walk(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Points and tangents through every layer together; no tangents are an empty tensor."""
        times = self.time(t)
        if context is not None:
            times = times.expand(*context.shape[:-1], times.shape[-1])
            times = torch.cat([times, context], -1)
        embedding = self.embed(times)
        h = self.enter(x)
        u = None if tangents is None else nn.functional.linear(tangents, self.enter.weight)
        for block in self.blocks:
            h, u = block(h, u, embedding)
        y, slope = self.activation(h)
        pushed = x.new_empty(0) if u is None else nn.functional.linear(slope * u, self.leave.weight)
        return self.leave(y), pushed

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"features={self.features}"
