"""How a context enters the layers of a velocity: by its shift, gains, weights or part of them.

FFJORD's amortised flows condition every layer of the field on an encoder's output; the ways are the
same for any time conditioning, because at a given time every layer is an affine map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.nets.fields import TimeMLP
from cnf.nets.time import TIME_LAYERS, Affine, TimeLayers, modulated
from cnf.registry import unknown_name


class LowRank(NamedTuple):
    """A layer with a weight of its own for each sample, W + U Vᵀ.

    Attributes:
        affine: the layer that all samples share.
        left: U, ``(*batch, outputs, rank)``.
        right: V, ``(*batch, inputs, rank)``.
    """

    affine: Affine
    left: Tensor
    right: Tensor

    @property
    def shared(self) -> bool:
        """Whether all points have the same weight: no."""
        return False

    def apply(self, x: Tensor) -> Tensor:
        """Map points."""
        return self.linear(x) + self.affine.shift

    def linear(self, u: Tensor) -> Tensor:
        """Map tangents: the same without the shift."""
        coefficients = (self.right.mT @ u.unsqueeze(-1)).squeeze(-1)
        return self.affine.linear(u) + (self.left @ coefficients.unsqueeze(-1)).squeeze(-1)


class Adapter(nn.Module, ABC):
    """Changes the layers of a network by a context.

    Args:
        sizes: features before, between and after the layers.
        context_features: features of the context.
    """

    def __init__(self, sizes: Sequence[int], context_features: int):
        super().__init__()
        self.sizes, self.context_features = tuple(sizes), context_features
        self.shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
        self.outputs = sum(sizes[1:])

    def linear(self, numbers: int, zero: bool = True) -> nn.Linear:
        """A linear map of the context; at zero it changes nothing at first."""
        layer = nn.Linear(self.context_features, numbers)
        if zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return layer

    @abstractmethod
    def adapt(self, layers: list[Affine], context: Tensor) -> list[Any]:
        """The layers for a context of ``(*batch, context_features)``."""


class FiLM(Adapter):
    """(1 + γ(c)) ⊙ (W x + b) + β(c), Perez et al. 2018."""

    def __init__(self, sizes: Sequence[int], context_features: int):
        super().__init__(sizes, context_features)
        self.film = self.linear(2 * self.outputs)

    def adapt(self, layers: list[Affine], context: Tensor) -> list[Any]:
        """Layers with gains and shifts for each sample."""
        gains, shifts = (part.split(self.sizes[1:], -1) for part in self.film(context).chunk(2, -1))
        triples = zip(layers, gains, shifts, strict=True)
        return [modulated(layer, gain, shift) for layer, gain, shift in triples]


class HyperNetwork(Adapter):
    """(W + ΔW(c)) x + b + Δb(c): all numbers of a layer depend on the context."""

    def __init__(self, sizes: Sequence[int], context_features: int):
        super().__init__(sizes, context_features)
        self.numbers = [rows * columns for rows, columns in self.shapes]
        self.network = self.linear(sum(self.numbers) + self.outputs)

    def adapt(self, layers: list[Affine], context: Tensor) -> list[Any]:
        """Layers with weights and shifts for each sample."""
        *changes, shift = self.network(context).split([*self.numbers, self.outputs], -1)
        shifts = shift.split(self.sizes[1:], -1)
        adapted = []
        for layer, change, shape, more in zip(layers, changes, self.shapes, shifts, strict=True):
            # time gates what is shared, not the change
            weight = layer.folded().weight + change.unflatten(-1, shape)
            adapted.append(Affine(weight, None, layer.shift + more))
        return adapted


class LowRankAdapter(Adapter):
    """(W + U(c) V(c)ᵀ) x + b + Δb(c), of FFJORD's amortised autoencoder.

    Args:
        sizes: features before, between and after the layers.
        context_features: features of the context.
        rank: columns of U and V.
    """

    def __init__(self, sizes: Sequence[int], context_features: int, rank: int = 4):
        super().__init__(sizes, context_features)
        self.rank = rank
        # one factor starts at zero and the other does not, or neither would ever move
        self.left = self.linear(rank * self.outputs)
        self.right = self.linear(rank * sum(sizes[:-1]), zero=False)
        self.shift = self.linear(self.outputs)

    def adapt(self, layers: list[Affine], context: Tensor) -> list[Any]:
        """Layers with a change of low rank for each sample."""
        shifts = self.shift(context).split(self.sizes[1:], -1)
        lefts = self.left(context).unflatten(-1, (-1, self.rank)).split(self.sizes[1:], -2)
        rights = self.right(context).unflatten(-1, (-1, self.rank)).split(self.sizes[:-1], -2)
        return [
            LowRank(layer._replace(shift=layer.shift + shift), left, right)
            for layer, shift, left, right in zip(layers, shifts, lefts, rights, strict=True)
        ]


ADAPTERS: dict[str, type[Adapter]] = {
    "film": FiLM,
    "hyper": HyperNetwork,
    "lowrank": LowRankAdapter,
}


class AdaptedLayers(nn.Module):
    """A stack of time layers whose context goes through an adapter."""

    def __init__(self, layers: TimeLayers, adapter: Adapter):
        super().__init__()
        self.layers, self.adapter, self.sizes = layers, adapter, layers.sizes

    def at(self, t: Tensor, context: Tensor | None) -> list[Any]:
        """Each layer at time ``t`` for a context."""
        layers = self.layers.at(t, None)
        return layers if context is None else self.adapter.adapt(layers, context)


class ConditionedMLP(TimeMLP):
    """A :class:`TimeMLP` whose context does more than shift its layers.

    Args:
        features: D, the size of x and of the velocity.
        context_features: size of the context.
        hidden: sizes of the hidden layers.
        by: ``"film"`` scales and shifts every unit, ``"hyper"`` makes all weights (its cost grows
            with their number), ``"lowrank"`` adds a matrix of low rank to each weight.
        conditioning: how time enters the layers, as in ``TimeMLP``.
        activation: as in ``TimeMLP``.

    Paper: Grathwohl et al., "FFJORD", ICLR 2019, section 4.2.

    Example:
        >>> import torch
        >>> field = ConditionedMLP(2, 3, (16,), by="lowrank")
        >>> field(torch.tensor(0.5), torch.zeros(7, 2), torch.ones(7, 3)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        by: str = "film",
        conditioning: str = "concatsquash",
        activation: str = "tanh",
    ):
        if by not in ADAPTERS:
            raise unknown_name("way of conditioning", by, ADAPTERS)
        if context_features < 1:
            raise ValueError(f"context_features must be positive, got {context_features}")
        super().__init__(features, hidden, conditioning=conditioning, activation=activation)
        sizes = self.layers.sizes
        self.by = by
        self.layers = AdaptedLayers(  # type: ignore[assignment]
            TIME_LAYERS[conditioning](sizes), ADAPTERS[by](sizes, context_features)
        )

    def trace(self, t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The velocity and tr J, from one product per dimension: each sample has its own layers."""
        basis = torch.eye(self.features, dtype=x.dtype, device=x.device)
        basis = basis.reshape(self.features, *[1] * (x.dim() - 1), self.features)
        velocity, products = self.push(t, x, context, basis.expand(-1, *x.shape))
        return velocity, products.diagonal(dim1=0, dim2=-1).sum(-1)

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"{self.layers.sizes}, by={self.by!r}"
