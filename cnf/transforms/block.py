"""Block neural autoregressive flows: one network of blocks is the map itself."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, softplus

from cnf.bijections import invert
from cnf.transforms.base import Mapped, Request, Transform

Offsets = Callable[[int, Tensor], Tensor]


class BlockLinear(nn.Module):
    """A linear layer between blocks of units, block i of which sees the blocks up to i only.

    The weights of block i on itself are positive: each unit is increasing in its own block. Rows
    are normalised to a learned length, as in weight normalisation.

    Args:
        features: D, how many blocks.
        inputs: units in a block before the layer.
        outputs: units in a block after it.
        length: the rows' length at the start.
        spread: the offsets start uniform within this much of zero.
        generator: where initial weights come from.
    """

    lower: Tensor

    def __init__(
        self,
        features: int,
        inputs: int,
        outputs: int,
        *,
        length: float = 1.0,
        spread: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        raw = 0.3 * torch.randn(features, outputs, features, inputs, generator=generator)
        # positive weights that start uniform: units that start alike would long stay alike
        own = torch.rand(features, inputs, outputs, generator=generator).clamp_min(1e-3).log()
        raw.diagonal(dim1=0, dim2=2).copy_(own.permute(2, 1, 0))
        self.raw = nn.Parameter(raw)
        self.log_length = nn.Parameter(torch.full((features, outputs), math.log(length)))
        self.bias = nn.Parameter(
            spread * (2 * torch.rand(features, outputs, generator=generator) - 1)
        )
        blocks = torch.ones(features, features).tril(-1)
        self.register_buffer("lower", blocks[:, None, :, None], persistent=False)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights on the blocks before ``(D·outputs, D·inputs)``; logs of those on its own.

        The latter are ``(D, outputs, inputs)``.
        """
        own = self.raw.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        before = self.raw * self.lower
        # the row's length, without squaring what exp made large
        logs = torch.cat([before.square().clamp_min(_tiny(own)).log().flatten(2), 2 * own], -1)
        shift = self.log_length - torch.logsumexp(logs, -1) / 2
        before = before * torch.exp(shift)[..., None, None]
        return before.flatten(2).flatten(0, 1), own + shift.unsqueeze(-1)


class BlockAutoregressive(Transform):
    """z = (1 - g) x + g f(x), with f a network whose Jacobian is lower triangular and positive.

    f has ``hidden`` layers of ``units`` tanh units for each feature; a gate g in (0, 1) for each
    feature keeps the map onto all of space. log |dz_i/dx_i| comes from products of the diagonal
    blocks' logarithms, in nats. ``inverse`` (x → z) is the formula; ``forward`` solves one
    increasing equation per feature, first features first, computing each unit's share of earlier
    features once, to ``cnf.bijections.tolerance_of``, with gradients. De Cao et al., "Block neural
    autoregressive flow" (2019).

    Args:
        features: D, the last axis of x.
        units: units for each feature in a hidden layer.
        hidden: how many hidden layers.
        context_features: the last axis of the context, which moves the first layer's offsets.
        generator: where initial weights come from.

    Example:
        >>> import torch
        >>> block = BlockAutoregressive(3, units=4)
        >>> x = torch.randn(5, 3)
        >>> z, log_det, _ = block.inverse(x)
        >>> torch.allclose(block(z).value, x, atol=1e-4), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        units: int = 8,
        hidden: int = 2,
        *,
        context_features: int = 0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if units < 1 or hidden < 1:
            raise ValueError(f"units and hidden must be at least 1, got {units} and {hidden}")
        self.features = features
        self.units = units
        sizes = [1, *[units] * hidden, 1]
        # the first offsets put the units' bends where standardised data is
        starts = [(1.5, 3.0), *[(1.5, 1.0)] * (hidden - 1), (3.0, 0.0)]
        self.layers = nn.ModuleList(
            BlockLinear(features, before, after, length=length, spread=spread, generator=generator)
            for (before, after), (length, spread) in zip(
                itertools.pairwise(sizes), starts, strict=True
            )
        )
        self.gate = nn.Parameter(torch.zeros(features))
        self.context_layer = (
            nn.Linear(context_features, features * units, bias=False) if context_features else None
        )

    @property
    def steps(self) -> tuple[int, int]:  # type: ignore[override]
        """One for each feature, forward."""
        return self.features, 1

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x, feature by feature."""
        self._check(z)
        weights, biases = self._prepare(context)
        known: list[Tensor] = [z.new_zeros((*z.shape[:-1], 0)) for _ in weights]
        values, log_det = [], z.new_zeros(z.shape[:-1])
        for i in range(self.features):
            here = slice(i, i + 1)
            rows = []
            for (before, own), bias, units in zip(weights, biases, known, strict=True):
                row = before.unflatten(0, own.shape[:2])[i, :, : units.shape[-1]]
                rows.append(bias[..., here, :] + linear(units, row).unsqueeze(-2))
            curve = functools.partial(
                self._run, offsets=_given(rows), blocks=[own[here] for _, own in weights], here=here
            )
            x, term = invert(lambda x, curve=curve: curve(x)[:2], z[..., here])  # type: ignore[misc]
            values.append(x)
            log_det = log_det + term.squeeze(-1)
            known = [
                torch.cat([units, new.flatten(-2)], -1)
                for units, new in zip(known, curve(x)[2], strict=True)
            ]
        return Mapped(torch.cat(values, -1), log_det, {})

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z, all features at once."""
        self._check(x)
        weights, biases = self._prepare(context)

        def offsets(layer: int, units: Tensor) -> Tensor:
            shares = linear(units.flatten(-2), weights[layer][0])
            return biases[layer] + shares.unflatten(-1, weights[layer][1].shape[:2])

        blocks = [own for _, own in weights]
        z, slopes, _ = self._run(x, offsets, blocks, slice(0, self.features))
        return Mapped(z, slopes.sum(-1), {})

    def _prepare(self, context: Tensor | None) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Every layer's weights, and its offsets ``(D, outputs)`` or with batch axes before."""
        layers: list[BlockLinear] = list(self.layers)  # type: ignore[arg-type]
        weights = [layer.weights() for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers]
        if self.context_layer is not None:
            if context is None:
                raise ValueError("this transform was built with a context: pass context=")
            shift = self.context_layer(context).unflatten(-1, (self.features, self.units))
            biases[0] = biases[0] + shift
        return weights, biases

    def _run(
        self, x: Tensor, offsets: Offsets, blocks: list[Tensor], here: slice
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The formula for some features.

        Args:
            x: their values, ``(*batch, n)``.
            offsets: from a layer's index and its inputs ``(*batch, n, inputs)`` to what reaches
                its units from everywhere but their own block, ``(*batch, n, outputs)``.
            blocks: for every layer the logs of the weights in the block, ``(n, outputs, inputs)``.
            here: which features they are.

        Returns:
            z, log dz/dx and the inputs of every layer.
        """
        units, slope = x.unsqueeze(-1), torch.zeros_like(x).unsqueeze(-1)
        inputs = []
        for layer, block in enumerate(blocks):
            if layer:
                # log of tanh's derivative, before tanh saturates
                slope = slope + 2 * (math.log(2) - units - softplus(-2 * units))
                units = torch.tanh(units)
            inputs.append(units)
            weight = torch.exp(block)
            units = offsets(layer, units) + _times(weight, units)
            largest = slope.detach().amax(-1, keepdim=True)
            slope = _times(weight, torch.exp(slope - largest)).log() + largest
        gate = self.gate[here]
        z = torch.lerp(x, units.squeeze(-1), torch.sigmoid(gate))
        slope = torch.logaddexp(
            logsigmoid(-gate).expand_as(x), logsigmoid(gate) + slope.squeeze(-1)
        )
        return z, slope, inputs

    def _check(self, value: Tensor) -> None:
        if value.ndim == 0 or value.shape[-1] != self.features:
            raise ValueError(f"expected (*batch, {self.features}), got {tuple(value.shape)}")

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.features}, units={self.units}, hidden={len(self.layers) - 1}"


def _times(weight: Tensor, units: Tensor) -> Tensor:
    """Block by block, ``(n, outputs, inputs)`` times ``(*batch, n, inputs)``."""
    return torch.einsum("noi,...ni->...no", weight, units)


def _given(rows: list[Tensor]) -> Offsets:
    """Offsets that are known already."""
    return lambda layer, units: rows[layer]


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
