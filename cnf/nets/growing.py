"""Linear layers that take their inputs, and give their units, level by level."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cnf.arrays import Array

# Multiplications in a product up to which NumPy is done before torch has started; from a few times
# as many on NumPy would have threads of its own, which keep torch's waiting.
LARGE = 1 << 17


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
        self.weight = weight
        self.units = [*itertools.accumulate(units, initial=0)]
        self.inputs = [*itertools.accumulate(inputs, initial=len(head))]
        self.known = np.empty((weight.shape[1], head.shape[1]), weight.dtype)
        self.known[: len(head)] = head
        self.product = _product if max(units) * self.known.size > LARGE else np.ndarray.dot

    def __call__(self, level: int, new: Array) -> Array:
        """Take a level's inputs ``(n, batch)`` and return its units."""
        last = self.inputs[level + 1]
        known = self.known[:last]
        known[self.inputs[level] :] = new
        return self.product(self.weight[self.units[level] : self.units[level + 1], :last], known)


def _product(weight: Array, values: Array) -> Array:
    """A large matrix product."""
    return torch.mm(torch.from_numpy(weight), torch.from_numpy(values)).numpy()


def of_arrays(activation: nn.Module) -> Callable[[Array], Array]:
    """An activation module as a function of arrays.

    >>> of_arrays(nn.ReLU())(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    if isinstance(activation, nn.ReLU):
        return lambda values: np.maximum(values, 0.0)
    if isinstance(activation, nn.Tanh):
        return np.tanh
    return lambda values: activation(torch.from_numpy(values)).numpy()
