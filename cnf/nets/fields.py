"""Velocity fields v(t, x, context), with their Jacobian products from the same pass.

A field is any module with ``forward(t, x, context)``, where ``t`` is a scalar, or one time per
sample. The fields here also offer ``push`` (J·u for given u) and ``trace`` (tr J): they know their
own layers, so that value and tangents go through each layer together and nothing is traced twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnf.compiling import by_columns
from cnf.nets.smooth import Smooth
from cnf.nets.tangents import fused
from cnf.nets.time import TIME_LAYERS, Affine
from cnf.onednn import product
from cnf.registry import unknown_name


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
        *inner, last = layers = self.layers.at(t, context)
        alike = not t.dim() and (context is None or context.shape[:-1] == x.shape[:-1])
        if alike and by_columns(x) and all(affine.shared for affine in layers):
            columns = x.reshape(-1, self.features).t()
            for affine in inner:
                columns = self.activation.value(affine.apply_columns(columns))
            return last.apply_columns(columns).t().reshape(x.shape)
        for affine in inner:
            x = self.activation.value(affine.apply(x))
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
        layers = self.layers.at(t, context)
        width = max(self.layers.sizes[1:-1], default=0)
        if _pushes_inputs(self.features, width, len(layers)) and self._can_fuse(layers):
            velocity, trace = self._fused(layers, x, None)
            return velocity, trace[0]
        *inner, last = layers
        activate = self.activation
        slopes = []
        for affine in inner:
            x, slope = activate(affine.apply(x))
            slopes.append(slope)
        weights = [affine.folded().weight for affine in layers]
        return last.apply(x), trace_of_product(weights, slopes).expand(x.shape[:-1])

    def quadratic(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocity and uᵀ J u, ``(k, *batch)``, for tangents u without a gradient."""
        layers = self.layers.at(t, context)
        if len(layers) > 1 and self._can_fuse(layers):
            return self._fused(layers, x, tangents)
        velocity, products = self.push(t, x, context, tangents)
        return velocity, (products * tangents).sum(-1)

    def _can_fuse(self, layers: list[Affine]) -> bool:
        """Whether the written-out pass may be taken: not within a transformation of the code."""
        return (
            self.activation.beta is None
            and all(layer.shared and layer.gate is None for layer in layers)
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        )

    def _fused(
        self, layers: list[Affine], x: Tensor, tangents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = x.shape[:-1]
        shifts = [
            shift if shift.dim() == 1 else shift.expand(*batch, -1).reshape(-1, shift.shape[-1])
            for shift in (layer.shift for layer in layers)
        ]
        if tangents is not None:
            tangents = tangents.reshape(tangents.shape[0], -1, tangents.shape[-1])
        velocity, products = fused(
            self.activation.name,
            x.reshape(-1, x.shape[-1]),
            tangents,
            [layer.weight for layer in layers],
            shifts,
        )
        return velocity.view(x.shape), products.view(-1, *batch)

    def extra_repr(self) -> str:
        """What distinguishes this field."""
        return f"{self.layers.sizes}"


def _pushes_inputs(columns: int, width: int, depth: int) -> bool:
    """Whether pushing the columns of the first layer is less work than those of the second."""
    return depth > 3 and columns * (depth - 2) <= width * (depth - 3)


def trace_of_product(weights: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """tr(Wₙ Sₙ₋₁ Wₙ₋₁ … S₁ W₁) with S = diag(slopes), one trace per sample.

    The trace is cyclic: with M = W₁ Wₙ, which no sample enters, the columns to push are either the
    D of W₁ through n - 2 layers or the H of W₂ S₁ through n - 3, whichever is less work. One hidden
    layer needs no product at all and two need a single one, whatever D is. Three make a trilinear
    form of the slopes, whose H³ numbers no sample enters: for a batch of H or more it is cheaper to
    apply than columns are to push.

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
    pushes_inputs = _pushes_inputs(columns, width, depth)
    if depth == 4 and not pushes_inputs and slopes[0].shape[:-1].numel() >= width:
        # a form of three vectors, made once for the batch: a product and a contraction of it
        form = cycle.unsqueeze(-1) * weights[2] * weights[1].T.unsqueeze(1)
        partial = product(slopes[0].flatten(0, -2), form.flatten(1))
        partial = partial.view(*slopes[0].shape[:-1], *form.shape[1:])
        return ((partial @ slopes[1].unsqueeze(-1)).squeeze(-1) * slopes[2]).sum(-1)
    if pushes_inputs:
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
