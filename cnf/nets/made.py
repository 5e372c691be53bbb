"""The masked autoregressive network, in parallel and feature by feature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from cnf.nets.activations import activation as make_activation
from cnf.nets.mlp import by_parameter, layer_widths, required, side_by_side, wire


class MaskedLinear(nn.Linear):
    """x ↦ (W ∘ M) x + b, ``(*batch, inputs)`` to ``(*batch, outputs)``.

    Args:
        mask: M, boolean, ``(outputs, inputs)``; kept as a buffer of zeros and ones.
        zero: start with zeros; else uniform within ±1/√(unmasked inputs of the unit).
    """

    mask: Tensor

    def __init__(self, mask: Tensor, zero: bool = False):
        super().__init__(mask.shape[1], mask.shape[0])
        # not boolean: the product with the weight is several times faster in one dtype
        self.register_buffer("mask", mask.to(self.weight.dtype))
        with torch.no_grad():
            # a unit that sees few inputs must not start quieter than one that sees all
            bound = self.mask.sum(1).clamp(min=1).rsqrt() * (not zero)
            self.weight.uniform_(-1, 1).mul_(bound.unsqueeze(1))
            self.bias.uniform_(-1, 1).mul_(bound)

    @property
    def masked_weight(self) -> Tensor:
        """W ∘ M."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return apply_linear(x, self.masked_weight, self.bias)


class _Growing:
    """A linear layer of which some inputs come in at each level, and then some units are known.

    Units are rows, so that those of a level lie side by side.

    Args:
        weight: ``(units, inputs)``, both sorted by level.
        bias: ``(units, batch or 1)``.
        units: how many units are known after each level.
        inputs: how many inputs come in at each level.
        batch: how many samples there are.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, units: list[int], inputs: list[int], batch: int
    ):
        self.units, self.inputs = units, inputs
        self.weights, self.biases = (rows.split_with_sizes(units) for rows in (weight, bias))
        self.known = weight.new_empty(0, batch)

    def __call__(self, level: int, new: Tensor) -> Tensor:
        """Take a level's inputs ``(n, batch)`` and return its units."""
        if self.inputs[level]:
            self.known = torch.cat([self.known, new])
        if not self.units[level]:
            return new[:0]
        weight = self.weights[level][:, : len(self.known)]
        return torch.addmm(self.biases[level], weight, self.known)


class _Filling(_Growing):
    """The same in place, several times faster where nothing has to be kept for a gradient.

    Inputs that are not known yet are zeros, as their weights are: to multiply by all of them costs
    less than to cut out those that are known.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, units: list[int], inputs: list[int], batch: int
    ):
        super().__init__(weight, bias.expand(-1, batch).clone(), units, inputs, batch)
        self.known = weight.new_zeros(sum(inputs), batch)
        self.places = self.known.split_with_sizes(inputs)
        self.empty = True

    def __call__(self, level: int, new: Tensor) -> Tensor:
        """Take a level's inputs ``(n, batch)`` and return its units."""
        if self.inputs[level]:
            self.places[level].copy_(new)
            self.empty = False
        if not self.units[level]:
            return new[:0]
        if self.empty:
            return self.biases[level]
        return self.biases[level].addmm_(self.weights[level], self.known)


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
        # how many features, and how many rows of each layer, become known in each step
        self._counts = depth.bincount().tolist()
        self._rows = [
            complete[unit].bincount(minlength=len(self._counts)).tolist() for unit in units
        ]
        # the layers that end in outputs: the last one, and the direct one if there is one
        self._rows += 2 * [[count * outputs for count in self._counts]]

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

        def linear(index: int, value: Tensor) -> Tensor:
            layer = layers[index]
            value = self._ending(layer, value) if index == last else layer(value)
            if index or shift is None:
                return value
            return value + (shift.unflatten(-1, value.shape[-2:]) if last == 0 else shift)

        result = wire(x, linear, len(layers), self.activation, self.residual)
        return result if self.direct is None else result + self._ending(self.direct, x)

    def autoregress(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """Find the values that agree with their own outputs, first features first.

        A hidden unit is computed once, when the features it sees are known, so all steps together
        take about the arithmetic of one forward pass. Differentiable with respect to all that
        ``step`` and the network depend on.

        Args:
            step: called with the part ``(*batch, n)`` of z that comes next and the outputs for it
                ``(*batch, n, outputs)``; returns the values there ``(*batch, n)``.
            z: what the values are computed from, ``(*batch, features)``.
            context: ``(*batch, context_features)``.

        Returns:
            ``(*batch, features)``.

        Example:
            >>> import torch
            >>> made = MADE(3, 1, zero_last=False)
            >>> z = torch.randn(5, 3)
            >>> x = made.autoregress(lambda part, shift: part + shift[..., 0], z)
            >>> torch.allclose(x, z + made(x)[..., 0], atol=1e-5)
            True
        """
        shape, batch = z.shape[:-1], math.prod(z.shape[:-1])
        layers = self._levels(context, batch)
        ordered = z if self._natural else z.index_select(-1, self.order)
        parts = ordered.split_with_sizes(self._counts, -1)
        values: list[Tensor] = []
        new = z.new_empty(0, batch)
        for level, part in enumerate(parts):
            result = self._advance(layers, level, new)
            values.append(step(part, result.t().reshape(*part.shape, self.outputs)))
            columns = self._columns(values[-1])
            new = columns.reshape(batch, columns.shape[-1]).t()
        found = torch.cat(values, -1)
        if not self._natural:
            found = found.index_select(-1, self.place)
        return found.reshape(*shape, self.features)

    def extra_repr(self) -> str:
        """Sizes, and the number of steps that ``autoregress`` takes."""
        return f"features={self.features}, outputs={self.outputs}, passes={len(self._counts)}"

    def _advance(self, layers: list[_Growing], level: int, new: Tensor) -> Tensor:
        """The outputs that come next ``(n · outputs, batch)``, now that ``new`` values are known.

        Args:
            layers: as of the level before.
            level: which features come next.
            new: values of the features of the level before, ``(n, batch)``.
        """
        result = wire(
            new,
            lambda index, value: layers[index](level, value),
            len(self.layers),
            self.activation,
            self.residual,
        )
        return result if self.direct is None else result + layers[-1](level, new)

    def _levels(self, context: Tensor | None, batch: int) -> list[_Growing]:
        """The layers, the direct one last, with their units sorted by when they become known."""
        layers = [*self.layers] if self.direct is None else [*self.layers, self.direct]
        shift = self._context_shift(context)
        last = len(self.layers) - 1
        # views that are written through do not survive where a compiler cuts its graph
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling()
        kind = _Filling if in_place else _Growing
        # a level takes the features of the level before
        inputs = 1 if self.period is None else 2
        features = [0, *(inputs * count for count in self._counts[:-1])]
        levels = []
        for index, (layer, rows) in enumerate(zip(layers, self._rows, strict=False)):
            weight, bias = layer.masked_weight, layer.bias.unsqueeze(1)
            if index == 0 and shift is not None:
                bias = bias + shift.reshape(batch, layer.out_features).t()
            takes_features = index in (0, last + 1)
            if takes_features:
                weight = self._sorted(weight.t(), inputs).t()
                # the last level's values feed nothing
                weight = weight[:, : sum(features)]
            if index >= last:
                weight = self._sorted(weight, self.outputs)
                bias = self._sorted(bias, self.outputs)
            counts = features if takes_features else self._rows[index - 1]
            levels.append(kind(weight, bias, rows, counts, batch))
        return levels

    def _ending(self, layer: MaskedLinear, value: Tensor) -> Tensor:
        """The outputs of a layer that ends in them, ``(*batch, features, outputs)``."""
        if side_by_side(self.outputs):
            return by_parameter(value, layer.masked_weight, layer.bias, self.outputs)
        return layer(value).unflatten(-1, (self.features, self.outputs))

    def _columns(self, x: Tensor) -> Tensor:
        """What the first layer sees of features: themselves, or each one's cosine and sine."""
        if self.period is None:
            return x
        angle = x * (2 * math.pi / self.period)
        return torch.stack([torch.cos(angle), torch.sin(angle)], -1).flatten(-2)

    def _sorted(self, rows: Tensor, size: int) -> Tensor:
        """Rows ``(features · size, n)`` with the features in order."""
        if self._natural:
            return rows
        blocks = rows.unflatten(0, (self.features, size))
        return blocks.index_select(0, self.order).flatten(0, 1)

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
