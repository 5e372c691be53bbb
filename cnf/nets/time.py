"""Linear layers conditioned on time: at any fixed time each is an affine map of its input.

FFJORD's layers, written as y = gate(t) ⊙ (x Wᵀ(t)) + shift(t, context). A context enters every
layer's shift, which is what concatenating it to the layer's input does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Affine(NamedTuple):
    """A layer at given times: x ↦ gate ⊙ (x Wᵀ) + shift, without whatever is None.

    Attributes:
        weight: ``(outputs, inputs)``, or ``(*batch, outputs, inputs)`` with one per sample.
        gate: ``(outputs,)`` or ``(*batch, outputs)``.
        shift: like ``gate``.
    """

    weight: Tensor
    gate: Tensor | None
    shift: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Map points."""
        if self.gate is None and self.weight.dim() == 2 and self.shift.dim() == 1:
            return nn.functional.linear(x, self.weight, self.shift)
        return self.linear(x) + self.shift

    def linear(self, u: Tensor) -> Tensor:
        """Map tangents: the same without the shift."""
        if self.weight.dim() == 2:
            u = nn.functional.linear(u, self.weight)
        else:
            u = (self.weight @ u.unsqueeze(-1)).squeeze(-1)
        return u if self.gate is None else u * self.gate


class TimeLinear(nn.Module, ABC):
    """A linear layer whose coefficients depend on time.

    Args:
        inputs: features in.
        outputs: features out.
        context_features: features of the context that is added to the shift, 0 for none.
    """

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.layer = nn.Linear(inputs, outputs)
        self.from_context = (
            nn.Linear(context_features, outputs, bias=False) if context_features else None
        )

    @abstractmethod
    def coefficients(self, t: Tensor) -> Affine:
        """The layer at time ``t``, a scalar or ``(*batch,)`` with one time per sample."""

    def at(self, t: Tensor, context: Tensor | None) -> Affine:
        """The layer at time ``t`` with what the context adds to its shift."""
        affine = self.coefficients(t)
        if affine.gate is not None and t.dim() == 0:
            # one small product instead of one as large as the batch
            affine = Affine(affine.weight * affine.gate.unsqueeze(-1), None, affine.shift)
        if self.from_context is not None and context is not None:
            affine = affine._replace(shift=affine.shift + self.from_context(context))
        return affine

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``(*batch, inputs)`` to ``(*batch, outputs)``."""
        return self.at(t, context).apply(x)


class IgnoreLinear(TimeLinear):
    """W x + b."""

    def coefficients(self, t: Tensor) -> Affine:
        """Constant in time."""
        return Affine(self.layer.weight, None, self.layer.bias)


class ConcatLinear(TimeLinear):
    """W [x, t] + b, the time as one more input."""

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0):
        super().__init__(inputs, outputs, context_features=context_features)
        self.time = nn.Linear(1, outputs, bias=False)

    def coefficients(self, t: Tensor) -> Affine:
        """A shift linear in time."""
        return Affine(self.layer.weight, None, self.layer.bias + self.time(t.unsqueeze(-1)))


class SquashLinear(TimeLinear):
    """(W x + b) ⊙ σ(g t + c)."""

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0):
        super().__init__(inputs, outputs, context_features=context_features)
        self.gate = nn.Linear(1, outputs)

    def coefficients(self, t: Tensor) -> Affine:
        """A gate that opens and closes with time."""
        gate = torch.sigmoid(self.gate(t.unsqueeze(-1)))
        return Affine(self.layer.weight, gate, self.layer.bias * gate)


class ConcatSquashLinear(SquashLinear):
    """(W x + b) ⊙ σ(g t + c) + h t, FFJORD's choice for most of its models."""

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0):
        super().__init__(inputs, outputs, context_features=context_features)
        self.time = nn.Linear(1, outputs, bias=False)

    def coefficients(self, t: Tensor) -> Affine:
        """A gate and a shift that depend on time."""
        squashed = super().coefficients(t)
        return squashed._replace(shift=squashed.shift + self.time(t.unsqueeze(-1)))


class HyperLinear(TimeLinear):
    """W(t) x + b(t), both put out by a small network of time."""

    def __init__(
        self, inputs: int, outputs: int, *, context_features: int = 0, hidden: int = 32
    ):
        super().__init__(inputs, outputs, context_features=context_features)
        # the layer's own numbers are the centre that the network departs from
        self.hyper = nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, outputs * (inputs + 1))
        )

    def coefficients(self, t: Tensor) -> Affine:
        """Weight and shift from the network of time."""
        change = self.hyper(t.unsqueeze(-1))
        weight, shift = change.split([self.outputs * self.inputs, self.outputs], dim=-1)
        weight = weight.unflatten(-1, (self.outputs, self.inputs))
        return Affine(self.layer.weight + weight, None, self.layer.bias + shift)


class BlendLinear(TimeLinear):
    """(1 - t) (W₀ x + b₀) + t (W₁ x + b₁)."""

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0):
        super().__init__(inputs, outputs, context_features=context_features)
        self.end = nn.Linear(inputs, outputs)

    def coefficients(self, t: Tensor) -> Affine:
        """Between two layers, linearly in time."""
        start, end, t = self.layer, self.end, t.unsqueeze(-1)
        weight = start.weight + t.unsqueeze(-1) * (end.weight - start.weight)
        return Affine(weight, None, start.bias + t * (end.bias - start.bias))


TIME_LINEAR: dict[str, type[TimeLinear]] = {
    "ignore": IgnoreLinear,
    "concat": ConcatLinear,
    "squash": SquashLinear,
    "concatsquash": ConcatSquashLinear,
    "hyper": HyperLinear,
    "blend": BlendLinear,
}
