"""Stacks of linear layers conditioned on time: at any fixed time each layer is an affine map.

FFJORD's layers, written as y = gate(t) ⊙ (x Wᵀ(t)) + shift(t, context). What depends on time alone
is computed for all layers of a network together: a field is evaluated some hundred times in a
training step, and for tables of usual size these small vectors would cost more than the products.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.compiling import realized
from cnf.nets.products import linear


class Affine(NamedTuple):
    """A layer at given times: x ↦ gate ⊙ (x Wᵀ) + shift; no gate is a gate of ones.

    Attributes:
        weight: ``(outputs, inputs)``, or ``(*batch, outputs, inputs)`` with one per sample.
        gate: ``(outputs,)`` or ``(*batch, outputs)``, or None.
        shift: ``(outputs,)`` or ``(*batch, outputs)``.
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor

    @property
    def shared(self) -> bool:
        """Whether all points have the same weight and gate."""
        return self.weight.dim() == 2 and (self.gate is None or self.gate.dim() == 1)

    def apply(self, x: Tensor) -> Tensor:
        """Map points."""
        if self.gate is None and self.weight.dim() == 2 and self.shift.dim() == 1:
            return linear(x, self.weight, self.shift, columns=False)
        if self.gate is not None and self.weight.dim() == 2:
            # one pass over the batch instead of two
            return torch.addcmul(self.shift, linear(x, self.weight, columns=False), self.gate)
        return self.linear(x) + self.shift

    def apply_columns(self, x: Tensor) -> Tensor:
        """Map points that are columns, ``(inputs, points)``, at one time for all."""
        value = self.weight @ x
        if self.gate is not None:
            value = value * self.gate.unsqueeze(-1)
        shift = self.shift
        if shift.dim() > 1:
            shift = shift.reshape(-1, shift.shape[-1])
        return value + (shift.unsqueeze(-1) if shift.dim() == 1 else shift.t())

    def folded(self) -> Affine:
        """The same with the gate in the weight."""
        if self.gate is None:
            return self
        return Affine(self.weight * self.gate.unsqueeze(-1), None, self.shift)

    def linear(self, u: Tensor) -> Tensor:
        """Map tangents: the same without the shift."""
        if self.weight.dim() == 2:
            u = linear(u, self.weight, columns=False)
        else:
            u = (self.weight @ u.unsqueeze(-1)).squeeze(-1)
        return u if self.gate is None else u * self.gate


def modulated(layer: Any, gain: Tensor, shift: Tensor) -> Any:
    """(1 + gain) ⊙ layer + shift, of an affine layer or convolution with gate and shift."""
    gain = 1 + gain
    gate = gain if layer.gate is None else gain * layer.gate
    return layer._replace(gate=gate, shift=gain * layer.shift + shift)


class Coefficients(NamedTuple):
    """All layers at given times; gate and shift hold the layers' outputs end to end."""

    weights: Sequence[Tensor]
    gate: Tensor | None
    shift: Tensor


class TimeLayers(nn.Module, ABC):
    """The linear layers of one network, whose coefficients depend on time.

    A context is added to every layer's shift, as if it were concatenated to the layer's input.

    Args:
        sizes: features before, between and after the layers.
        context_features: features of the context, 0 for none.
    """

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0):
        super().__init__()
        self.sizes = tuple(sizes)
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]
        self.weights = nn.ParameterList([layer.weight for layer in layers])
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
        self.from_context = (
            nn.Linear(context_features, self.outputs, bias=False) if context_features else None
        )

    @property
    def outputs(self) -> int:
        """The outputs of all layers together."""
        return sum(self.sizes[1:])

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """The layers at time ``t``, a scalar or ``(*batch,)`` with one time per sample."""

    def at(self, t: Tensor, context: Tensor | None) -> list[Affine]:
        """Each layer at time ``t``, with what the context adds to its shift.

        Args:
            t: a scalar, or ``(*batch,)``.
            context: ``(*batch, context_features)``.
        """
        if t.dim() and t.stride(-1) == 0:
            t = t[..., :1]  # one time along the whole axis: what follows from it is computed once
        weights, gate, shift = self.coefficients(t)
        compiling = torch.compiler.is_compiling()
        if compiling and not t.dim():
            gate, shift = (None if gate is None else realized(gate)), realized(shift)
        if self.from_context is not None and context is not None:
            shift = shift + self.from_context(context)
        shifts = shift.split(self.sizes[1:], -1)
        gates = [None] * len(shifts) if gate is None else gate.split(self.sizes[1:], -1)
        layers = [Affine(*layer) for layer in zip(weights, gates, shifts, strict=True)]
        # at one time for all, the gate is cheaper on the weight than on the batch, except where
        # compiled code multiplies by it in the same pass that computes the activation
        if compiling or (gate is not None and gate.dim() > 1):
            return layers
        return [layer.folded() for layer in layers]

    def _vector(self) -> nn.Parameter:
        """A coefficient of time for every output."""
        return nn.Parameter(torch.empty(self.outputs).uniform_(-1, 1))


class Ignore(TimeLayers):
    """W x + b."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Constant in time."""
        return Coefficients(list(self.weights), None, self.bias)


class Concat(TimeLayers):
    """W [x, t] + b, the time as one more input."""

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0):
        super().__init__(sizes, context_features=context_features)
        self.shift_slope = self._vector()

    def coefficients(self, t: Tensor) -> Coefficients:
        """A shift linear in time."""
        shift = torch.addcmul(self.bias, self.shift_slope, t.unsqueeze(-1))
        return Coefficients(list(self.weights), None, shift)


class Squash(TimeLayers):
    """(W x + b) ⊙ σ(g t + c)."""

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0):
        super().__init__(sizes, context_features=context_features)
        self.gate_slope, self.gate_bias = self._vector(), self._vector()

    def coefficients(self, t: Tensor) -> Coefficients:
        """A gate that opens and closes with time."""
        gate = torch.sigmoid(torch.addcmul(self.gate_bias, self.gate_slope, t.unsqueeze(-1)))
        return Coefficients(list(self.weights), gate, self.bias * gate)


class ConcatSquash(Squash):
    """(W x + b) ⊙ σ(g t + c) + h t, FFJORD's choice for most of its models."""

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0):
        super().__init__(sizes, context_features=context_features)
        self.shift_slope = self._vector()

    def coefficients(self, t: Tensor) -> Coefficients:
        """A gate and a shift that depend on time."""
        weights, gate, shift = super().coefficients(t)
        return Coefficients(weights, gate, torch.addcmul(shift, self.shift_slope, t.unsqueeze(-1)))


class Hyper(TimeLayers):
    """W(t) x + b(t): a small network of time puts out how far all numbers depart from W and b."""

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0, hidden: int = 32):
        super().__init__(sizes, context_features=context_features)
        numbers = sum(weight.numel() for weight in self.weights) + self.outputs
        self.network = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, numbers))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Weights and shifts from the network of time."""
        sizes = [weight.numel() for weight in self.weights]
        *changes, shift = self.network(t.unsqueeze(-1)).split([*sizes, self.outputs], -1)
        weights = [
            weight + change.unflatten(-1, weight.shape)
            for weight, change in zip(self.weights, changes, strict=True)
        ]
        return Coefficients(weights, None, self.bias + shift)


class Blend(TimeLayers):
    """(1 - t) (W₀ x + b₀) + t (W₁ x + b₁)."""

    def __init__(self, sizes: Sequence[int], *, context_features: int = 0):
        super().__init__(sizes, context_features=context_features)
        self.end = Ignore(sizes)

    def coefficients(self, t: Tensor) -> Coefficients:
        """Between two stacks of layers, linearly in time."""
        t = t.unsqueeze(-1)
        weights = [
            start + t.unsqueeze(-1) * (end - start)
            for start, end in zip(self.weights, self.end.weights, strict=True)
        ]
        return Coefficients(weights, None, torch.addcmul(self.bias, self.end.bias - self.bias, t))


TIME_LAYERS: dict[str, type[TimeLayers]] = {
    "ignore": Ignore,
    "concat": Concat,
    # on vectors a shift linear in time, and time beside coordinates that are constant, come to it
    "concat_v2": Concat,
    "concatcoord": Concat,
    "squash": Squash,
    "concatsquash": ConcatSquash,
    "hyper": Hyper,
    "blend": Blend,
}
