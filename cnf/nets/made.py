"""The masked autoregressive network, in parallel and feature by feature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnf.arrays import Array, fits_arrays
from cnf.nets.activations import activation as make_activation
from cnf.nets.growing import Growing, GrowingArray, Levels, grown, of_arrays
from cnf.nets.mlp import by_parameter, layer_widths, required, side_by_side, unwatched, wire
from cnf.nets.products import FEW, linear


class MaskedLinear(nn.Linear):
    """x ↦ (W ∘ M) x + b, ``(*batch, inputs)`` to ``(*batch, outputs)``.

    Args:
        mask: M, boolean, ``(outputs, inputs)``; kept as a buffer of zeros and ones.
        zero: start with zeros; else uniform within ±1/√(unmasked inputs of the unit).
    """

    mask: Tensor
    full = False

    def __init__(self, mask: Tensor, zero: bool = False):
        super().__init__(mask.shape[1], mask.shape[0])
        # not boolean: the product with the weight is several times faster in one dtype
        mask = mask.to(self.weight.dtype)
        if 1 < mask.shape[1] < FEW:
            mask = mask.t().contiguous().t()  # and lies as this, which is how ``linear`` wants it
        self.register_buffer("mask", mask)
        with torch.no_grad():
            # a unit that sees few inputs must not start quieter than one that sees all
            bound = self.mask.sum(1).clamp(min=1).rsqrt() * (not zero)
            self.weight.uniform_(-1, 1).mul_(bound.unsqueeze(1))
            self.bias.uniform_(-1, 1).mul_(bound)
        _look(self)
        self.register_load_state_dict_post_hook(_look)

    @property
    def masked_weight(self) -> Tensor:
        """W ∘ M."""
        return self.weight if self.full else self.mask * self.weight

    @property
    def masked_array(self) -> Array:
        """The same without a gradient."""
        weight = self.weight.detach().numpy()
        return weight if self.full else self.mask.numpy() * weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.masked_weight, self.bias)


def _look(layer: MaskedLinear, _: object = None) -> None:
    """Note whether nothing is masked, also after loading: the mask travels with the state."""
    layer.full = bool(layer.mask.all())


class MADE(nn.Module):
    """A network whose outputs for feature i depend on the features before i only.

    Every hidden unit carries a set of features that it may see: one of the sets that some feature
    depends on. A unit feeds the units and outputs whose sets contain its own. Units stand sorted by
    how early their set is complete, so ``autoregress`` computes each of them once. Where a layer
    is narrower than the number of sets, a masked linear map from x to the outputs keeps every
    feature in reach. The context enters the first layer, unmasked. Germain et al. 2015,
    https://arxiv.org/abs/1502.03509.

    Args:
        features: the last axis of x.
        outputs: how many numbers to give for each feature.
        hidden: widths of the hidden layers, or of the residual blocks (see ``MLP``).
        context_features: the last axis of the context; 0 for none, and what is given is ignored.
        order: ``"natural"`` (which None means), ``"reverse"``, ``"random"``, or the features from
            the first to the last.
        activation: a name from ``cnf.nets.activations``.
        residual: build residual blocks, which all need one width.
        passes: into how many groups the order is cut; a feature depends on the groups before its
            own. ``features`` (or None) is fully autoregressive, 2 is a coupling.
        adjacency: instead of order and passes, a dependency graph: row i says which features the
            outputs of feature i depend on. It must have no cycle.
        zero_last: start with a last layer of zeros, so that a flow starts as the identity.
        generator: draws the random order.
        period: of every feature, which then enters as its cosine and sine; None for none.

    Example:
        >>> import torch
        >>> made = MADE(3, 2, zero_last=False)
        >>> jacobian = torch.autograd.functional.jacobian(made, torch.randn(3))
        >>> (jacobian != 0).any(1).int()  # which output sees which input
        tensor([[0, 0, 0],
                [1, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
    """

    order: Tensor
    place: Tensor

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        order: str | Sequence[int] | None = None,
        activation: str = "relu",
        residual: bool = False,
        passes: int | None = None,
        adjacency: Tensor | Sequence[Sequence[bool]] | None = None,
        zero_last: bool = True,
        generator: torch.Generator | None = None,
        period: float | None = None,
    ):
        super().__init__()
        if features < 1 or outputs < 1:
            raise ValueError(f"expected features, outputs >= 1, got {features}, {outputs}")
        if period is not None and not period > 0:
            raise ValueError(f"a period is positive, got {period}")
        self.period = period
        self.features = features
        self.outputs = outputs
        self.context_features = context_features
        self.residual = residual
        self.activation = make_activation(activation)
        self._natural = adjacency is None and order in (None, "natural")
        if adjacency is None:
            sequence = _sequence(features, order, generator)
            parents, depth = _grouped(features, sequence, passes)
        elif order is None and passes is None:
            parents, depth = _graph(features, adjacency)
        else:
            raise ValueError("give a dependency graph, or an order and passes, not both")
        first_to_last = depth.argsort(stable=True)
        self.register_buffer("order", first_to_last)
        self.register_buffer("place", first_to_last.argsort())

        sets, complete = _sets(parents, depth, bool(context_features))
        widths = layer_widths(features, hidden, outputs, residual)[1:-1]
        units = [_spread(width, len(sets)) for width in widths]
        inputs = 1 if period is None else 2  # columns for each feature
        own = torch.eye(features, dtype=torch.bool).repeat_interleave(inputs, 0)
        seen = [own, *(sets[unit] for unit in units)]
        masks = [_contained(a, b) for a, b in zip(seen, [*seen[1:], parents], strict=True)]
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks[:-1])
        self.layers.append(MaskedLinear(masks[-1].repeat_interleave(outputs, 0), zero_last))
        self.direct: MaskedLinear | None = None
        if any(width < len(sets) for width in widths):
            reach = parents.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
            self.direct = MaskedLinear(reach, zero_last)
        self.context_layer: nn.Linear | None = None
        if context_features:
            rows = (widths or [features * outputs])[0]
            self.context_layer = nn.Linear(context_features, rows, bias=False)
            if zero_last and not widths:
                nn.init.zeros_(self.context_layer.weight)
        # how many features become known in each step, and which parts of each layer
        self._counts = depth.bincount().tolist()
        ending = [count * outputs for count in self._counts]
        found = [0, *(count * inputs for count in self._counts)]
        steps = len(self._counts)
        known = [found, *(complete[unit].bincount(minlength=steps).tolist() for unit in units)]
        self._levels = [
            Levels(after, before, 1 if index else 1 + context_features)
            for index, (before, after) in enumerate(pairwise([*known, ending]))
        ]
        self._levels.append(Levels(ending, found, 1))  # the direct layer's

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs of all features at once.

        Args:
            x: ``(*batch, features)``.
            context: ``(*batch, context_features)``.

        Returns:
            ``(*batch, features, outputs)``; ``[..., i, :]`` depends on earlier features only.
        """
        shift = self._context_shift(context)
        x = self._columns(x)
        layers: list[MaskedLinear] = [*self.layers]
        last = len(layers) - 1
        activate, calls = unwatched(self.activation, layers, self.residual)

        def apply(index: int, value: Tensor) -> Tensor:
            if index == last:
                value = self._ending(layers[last], calls[last], value)
            else:
                value = calls[index](value)
            if index or shift is None:
                return value
            return value + (shift.unflatten(-1, value.shape[-2:]) if last == 0 else shift)

        result = wire(x, apply, len(layers), activate, self.residual)
        if self.direct is None:
            return result
        return result + self._ending(self.direct, self.direct, x)

    def autoregress(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        context: Tensor | None = None,
        array_step: Callable[[Array, Array], Array] | None = None,
    ) -> Tensor:
        """Find the values that agree with their own outputs, first features first.

        A hidden unit is computed once, when the features it sees are known, so all steps together
        take about the arithmetic of one forward pass. Differentiable with respect to all that
        ``step`` and the network depend on.

        Args:
            step: called with the rows ``(n, batch)`` of z that come next and the outputs for them
                ``(n, batch, outputs)``; returns the values there ``(n, batch)``.
            z: what the values are computed from, ``(*batch, features)``.
            context: ``(*batch, context_features)``.
            array_step: the same for arrays of NumPy, which may overwrite the outputs. Where no
                gradient is wanted on a CPU, the network is then computed in arrays, too, which
                takes a fraction of the time.

        Returns:
            ``(*batch, features)``; from arrays with each feature's numbers side by side.

        Example:
            >>> import torch
            >>> made = MADE(3, 1, zero_last=False)
            >>> z = torch.randn(5, 3)
            >>> x = made.autoregress(lambda part, shift: part + shift[..., 0], z)
            >>> torch.allclose(x, z + made(x)[..., 0], atol=1e-5)
            True
        """
        given = [z] if context is None else [z, context]
        if array_step is not None and fits_arrays(*given, *self._numbers()):
            return self._autoregress_arrays(array_step, z, context)
        rows = z.reshape(math.prod(z.shape[:-1]), self.features).t()
        if not self._natural:
            rows = rows.index_select(0, self.order)
        layers = self._growing(context, rows.shape[1])
        network = self._wired(layers, self.activation)
        rows = torch.cat(self._grow(step, rows.contiguous(), network))
        if not self._natural:
            rows = rows.index_select(0, self.place)
        return rows.t().contiguous().view(z.shape)

    @property
    def passes(self) -> int:
        """The number of steps that ``autoregress`` takes."""
        return len(self._counts)

    def extra_repr(self) -> str:
        """Sizes and passes."""
        return f"features={self.features}, outputs={self.outputs}, passes={self.passes}"

    def _autoregress_arrays(
        self, step: Callable[[Array, Array], Array], z: Tensor, context: Tensor | None
    ) -> Tensor:
        """``autoregress`` in arrays."""
        rows = self._sorted(z.detach().numpy().reshape(-1, self.features).T, 1)
        layers = self._growing_arrays(context, rows.shape[1])
        activate = of_arrays(self.activation, rows.dtype)
        with np.errstate(all="ignore"):  # torch does not warn of infinities either
            if self.residual or self.direct is not None or self.period is not None:
                found = np.concatenate(self._grow(step, rows, self._wired(layers, activate)))
            else:
                found = grown(layers, activate, step, rows, self.outputs)
        if not self._natural:
            found = found[self.place.numpy()]
        return torch.from_numpy(found.T.reshape(z.shape))

    def _grow(
        self, step: Callable[[Any, Any], Any], rows: Any, network: Callable[[int, Any], Any]
    ) -> list[Any]:
        """The values of each level, all tensors or all arrays.

        Args:
            step: as in ``autoregress``.
            rows: of z, in order.
            network: from a level and its inputs to the outputs that are known then.
        """
        batch = rows.shape[1]
        found: list[Any] = []
        new, first = rows[:0], 0
        for level, count in enumerate(self._counts):
            outputs = network(level, new).reshape(count, self.outputs, batch).swapaxes(1, 2)
            found.append(step(rows[first : first + count], outputs))
            first += count
            new = self._column_rows(found[-1])
        return found

    def _wired(
        self, layers: Sequence[Callable[[int, Any], Any]], activate: Callable[[Any], Any]
    ) -> Callable[[int, Any], Any]:
        """The network of growing layers, the direct one last."""
        depth = len(self.layers)

        def run(level: int, new: Any) -> Any:
            def grow(index: int, value: Any) -> Any:
                return layers[index](level, value)

            result = wire(new, grow, depth, activate, self.residual)
            return result + grow(depth, new) if depth < len(layers) else result

        return run

    def _growing(self, context: Tensor | None, batch: int) -> list[Growing]:
        """The layers, the direct one last, with their units sorted by when they become known."""
        shift = self._context_shift(context)
        layers = []
        for index, layer in enumerate(self._all_layers):
            weight = self._columns_by_level(index, layer.masked_weight)
            bias = layer.bias.unsqueeze(1)
            if index == 0 and shift is not None:
                bias = bias + shift.reshape(batch, layer.out_features).t()
            weight, bias = (self._rows_by_level(index, rows) for rows in (weight, bias))
            layers.append(Growing(weight, bias, self._levels[index], batch))
        return layers

    def _growing_arrays(self, context: Tensor | None, batch: int) -> list[GrowingArray]:
        """The same layers for arrays."""
        layers = []
        for index, layer in enumerate(self._all_layers):
            levels = self._levels[index]
            weight = self._columns_by_level(index, layer.masked_array)
            head = np.ones((levels.head, batch), weight.dtype)
            weights = [layer.bias.detach().numpy()[:, None], weight]
            if index == 0 and self.context_layer is not None:
                seen = required(context, self.context_features).detach().numpy()
                head[1:] = seen.reshape(batch, self.context_features).T
                weights.insert(1, self.context_layer.weight.detach().numpy())
            weight = self._rows_by_level(index, np.concatenate(weights, 1))
            layers.append(GrowingArray(weight, head, levels))
        return layers

    def _numbers(self) -> list[Tensor]:
        """The parameters; torch takes longer to collect them."""
        layers: list[nn.Linear] = [*self._all_layers]
        numbers = [number for layer in layers for number in (layer.weight, layer.bias)]
        return numbers if self.context_layer is None else [*numbers, self.context_layer.weight]

    @property
    def _all_layers(self) -> list[MaskedLinear]:
        """The layers, the direct one last."""
        return [*self.layers] if self.direct is None else [*self.layers, self.direct]

    def _columns_by_level(self, index: int, weight: Any) -> Any:
        """A layer's masked weight, its columns sorted by when their inputs come in."""
        if 0 < index < len(self.layers):
            return weight
        return self._sorted(weight.T, 1 if self.period is None else 2).T

    def _rows_by_level(self, index: int, rows: Any) -> Any:
        """Rows for a layer's units, sorted by when they become known."""
        return rows if index < len(self.layers) - 1 else self._sorted(rows, self.outputs)

    def _ending(
        self, layer: MaskedLinear, call: Callable[[Tensor], Tensor], value: Tensor
    ) -> Tensor:
        """The outputs of a layer that ends in them, ``(*batch, features, outputs)``."""
        if side_by_side(self.outputs):
            return by_parameter(value, layer.masked_weight, layer.bias, self.outputs)
        value = call(value)
        return value.view(*value.shape[:-1], self.features, self.outputs)

    def _columns(self, x: Tensor) -> Tensor:
        """What the first layer sees of features: themselves, or each one's cosine and sine."""
        if self.period is None:
            return x
        angle = x * (2 * math.pi / self.period)
        return torch.stack([torch.cos(angle), torch.sin(angle)], -1).flatten(-2)

    def _column_rows(self, values: Any) -> Any:
        """``_columns`` of rows, a tensor or an array."""
        if self.period is None:
            return values
        if isinstance(values, Tensor):
            return self._columns(values.t()).t()
        return self._columns(torch.from_numpy(values).t()).t().numpy()

    def _sorted(self, rows: Any, size: int) -> Any:
        """Rows ``(features · size, n)`` with the features in order, a tensor or an array."""
        if self._natural:
            return rows
        blocks = rows.reshape(self.features, size, rows.shape[1])
        if isinstance(rows, Tensor):
            return blocks.index_select(0, self.order).flatten(0, 1)
        return blocks[self.order.numpy()].reshape(rows.shape)

    def _context_shift(self, context: Tensor | None) -> Tensor | None:
        """What the context adds to the first layer, ``(*batch, units)``."""
        if self.context_layer is None:
            return None
        return self.context_layer(required(context, self.context_features))


def _sequence(
    features: int, order: str | Sequence[int] | None, generator: torch.Generator | None
) -> Tensor:
    """The features from first to last."""
    if order is None or order == "natural":
        return torch.arange(features)
    if order == "reverse":
        return torch.arange(features).flip(0)
    if order == "random":
        return torch.randperm(features, generator=generator)
    sequence = [order] if isinstance(order, str) else [int(index) for index in order]
    if sorted(map(str, sequence)) != sorted(map(str, range(features))):
        raise ValueError(
            f'order is "natural", "reverse", "random" or a permutation of 0 to {features - 1}, '
            f"got {order!r}"
        )
    return torch.tensor(sequence)


def _grouped(features: int, sequence: Tensor, passes: int | None) -> tuple[Tensor, Tensor]:
    """What each feature depends on ``(features, features)``, and the group it is in."""
    passes = features if passes is None else passes
    if not 1 <= passes <= features:
        raise ValueError(f"passes must be 1 to {features}, the number of features, got {passes}")
    group = sequence.argsort() * passes // features
    return group.unsqueeze(1) > group, group


def _graph(features: int, adjacency: Tensor | Sequence[Sequence[bool]]) -> tuple[Tensor, Tensor]:
    """The dependency graph as a tensor, and every feature's longest chain of ancestors."""
    parents = torch.as_tensor(adjacency, dtype=torch.bool, device="cpu")
    if parents.shape != (features, features):
        raise ValueError(
            f"adjacency must have shape ({features}, {features}), got {tuple(parents.shape)}"
        )
    depth = torch.zeros(features, dtype=torch.long)
    known = torch.zeros(features, dtype=torch.bool)
    level = 0
    while not known.all():
        ready = ~known & ~(parents & ~known).any(1)
        if not ready.any():
            raise ValueError(
                f"the dependency graph has a cycle: {_cycle(parents & ~known, known)} (an arrow "
                "points to what a feature depends on); remove one of these dependencies"
            )
        depth[ready] = level
        known |= ready
        level += 1
    return parents, depth


def _cycle(parents: Tensor, known: Tensor) -> str:
    """A cycle among the features that are not known, each of which has an unknown parent."""
    path = [int((~known).nonzero()[0])]
    while (parent := int(parents[path[-1]].nonzero()[0])) not in path:
        path.append(parent)
    return " → ".join(map(str, [*path[path.index(parent) :], parent]))


def _sets(parents: Tensor, depth: Tensor, with_empty: bool) -> tuple[Tensor, Tensor]:
    """The distinct sets that features depend on, and after how many levels each is complete.

    The empty set is of use only to units that see a context, or where there is no other.
    """
    sets = torch.unique(parents, dim=0)
    complete = (sets * (depth + 1)).amax(1)
    if not with_empty and len(sets) > 1:
        sets, complete = sets[complete > 0], complete[complete > 0]
    earliest = complete.argsort(stable=True)
    return sets[earliest], complete[earliest]


def _spread(units: int, sets: int) -> Tensor:
    """Which set each of a layer's units carries, in increasing order."""
    if units >= sets:
        return (torch.arange(units) % sets).sort().values
    return torch.linspace(0, sets - 1, units).round().long()


def _contained(sets: Tensor, within: Tensor) -> Tensor:
    """Whether set j is contained in set i of ``within``, ``(len(within), len(sets))``."""
    return (~within).float() @ sets.float().t() == 0
