"""Linear layers that take their inputs, and give their units, level by level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cnf.arrays import Array

# Multiplications in a product up to which NumPy is done before torch has started; from a few times
# as many on NumPy would have threads of its own, which keep torch's waiting.
LARGE = 1 << 17


class Activate(Protocol):
    """An activation of arrays, whose result may go where its values were."""

    def __call__(self, values: Array, /, out: Array | None = None) -> Array:
        """Apply the activation."""


class Growing:
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


class GrowingArray:
    """The same for arrays: where no gradient is taken, several times faster on a CPU.

    Args:
        weight: ``(units, head + inputs)``.
        head: inputs that are known from the start, ``(head, batch)``; ones among them for a bias.
        units: how many units are known after each level.
        inputs: how many inputs come in at each level.
    """

    def __init__(self, weight: Array, head: Array, units: list[int], inputs: list[int]):
        self.known = np.empty((weight.shape[1], head.shape[1]), weight.dtype)
        self.known[: len(head)] = head
        rows = [*accumulate(units, initial=0)]
        ends = [*accumulate(inputs, initial=len(head))]
        self.slots = [self.known[a:b] for a, b in pairwise(ends)]
        self.knowns = [self.known[:end] for end in ends[1:]]
        self.weights = [weight[a:b, :c] for a, b, c in zip(rows, rows[1:], ends[1:], strict=False)]
        self.product = _product if max(units) * self.known.size > LARGE else np.ndarray.dot

    def __call__(self, level: int, new: Array) -> Array:
        """Take a level's inputs ``(n, batch)`` and return its units."""
        self.slots[level][...] = new
        return self.product(self.weights[level], self.knowns[level])


def chained(layers: Sequence[GrowingArray], activate: Activate) -> Callable[[int, Array], Array]:
    """Plain layers as one function of a level and its inputs, which gives the last one's units.

    A layer's units are computed where the next one takes them from.
    """
    links = [
        (layer.product, [*zip(layer.weights, layer.knowns, after.slots, strict=True)])
        for layer, after in pairwise(layers)
    ]
    slots, last = layers[0].slots, layers[-1]

    def run(level: int, new: Array) -> Array:
        slots[level][...] = new
        for product, levels in links:
            weight, known, units = levels[level]
            if len(units):
                product(weight, known, out=units)
                activate(units, out=units)
        return last.product(last.weights[level], last.knowns[level])

    return run


def _product(weight: Array, values: Array, out: Array | None = None) -> Array:
    """A large matrix product."""
    result = None if out is None else torch.from_numpy(out)
    return torch.mm(torch.from_numpy(weight), torch.from_numpy(values), out=result).numpy()


def of_arrays(activation: nn.Module, dtype: Any = float) -> Activate:
    """An activation module as a function of arrays of a dtype.

    >>> of_arrays(nn.ReLU())(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    if isinstance(activation, nn.ReLU):
        # NumPy takes as long to make an array of a number as to compare some hundreds
        return partial(np.maximum, np.zeros((), dtype))
    if isinstance(activation, nn.Tanh):
        return np.tanh

    def apply(values: Array, out: Array | None = None) -> Array:
        result = activation(torch.from_numpy(values)).numpy()
        if out is not None:
            out[...] = result
        return result

    return apply
