"""Linear layers that take their inputs, and give their units, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class Levels:
    """Which units and inputs of a layer come with each level.

    Args:
        units: how many units are known after each level.
        inputs: how many inputs come in at each level; after the last one, too, if any.
        head: how many inputs of ``GrowingArray`` are known from the start.

    Attributes:
        places: the rows that the inputs of each level go to.
        known: the rows of all inputs that are known then.
        weights: the rows and columns of the weight for the units that are known then.
    """

    def __init__(self, units: list[int], inputs: list[int], head: int):
        self.units, self.inputs, self.head = units, inputs, head
        # kept, because to make a slice takes as long as to take it
        self.places = [*_slices(inputs, head)]
        self.known = [slice(place.stop) for place in self.places]
        self.weights = [*zip(_slices(units), self.known, strict=False)]


def _slices(counts: list[int], start: int = 0) -> Iterator[slice]:
    """So many rows each, one after the other."""
    return (slice(*ends) for ends in pairwise(accumulate(counts, initial=start)))


class Growing:
    """A linear layer of which some inputs come in at each level, and then some units are known.

    Units are rows, so that those of a level lie side by side.

    Args:
        weight: ``(units, inputs)``, both sorted by level.
        bias: ``(units, batch or 1)``.
        levels: which units and inputs come with each level.
        batch: how many samples there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor, levels: Levels, batch: int):
        self.units, self.inputs = levels.units, levels.inputs
        self.weights, self.biases = (rows.split_with_sizes(self.units) for rows in (weight, bias))
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
        levels: which units and inputs come with each level.

    Attributes:
        inputs: ``(head + inputs, batch)``, of which the head is filled.
        product: of matrices of these sizes.
    """

    def __init__(self, weight: Array, head: Array, levels: Levels):
        self.weight, self.levels = weight, levels
        self.inputs = np.empty((levels.places[-1].stop, head.shape[1]), weight.dtype)
        self.inputs[: len(head)] = head
        large = max(levels.units) * self.inputs.size > LARGE
        self.product: Callable[..., Array] = _product if large else np.ndarray.dot

    def __call__(self, level: int, new: Array) -> Array:
        """Take a level's inputs ``(n, batch)`` and return its units."""
        levels = self.levels
        self.inputs[levels.places[level]] = new
        return self.product(self.weight[levels.weights[level]], self.inputs[levels.known[level]])


def grown(
    layers: Sequence[GrowingArray],
    activate: Activate,
    step: Callable[[Array, Array], Array],
    rows: Array,
    size: int,
) -> Array:
    """What a step makes of rows and of what plain layers make of the values before them.

    Everything is computed where it is needed next: a layer's units among the inputs of the layer
    after it, and the values in place of the rows, among the first layer's inputs.

    Args:
        layers: from the first to the last.
        activate: goes between them.
        step: from the next rows ``(n, batch)`` and the outputs for them ``(n, batch, size)``, which
            it may overwrite, to their values.
        rows: what the step takes, ``(all, batch)``.
        size: how many outputs belong to a row.

    Returns:
        The values, ``(all, batch)``.
    """
    first, last, batch = layers[0].levels, layers[-1].levels, rows.shape[1]
    values, inputs = layers[0].inputs, layers[-1].inputs
    values[first.head :] = rows
    between = [
        (before.levels, before.weight, before.inputs, before.product, after.levels, after.inputs)
        for before, after in pairwise(layers)
    ]
    product, weight = layers[-1].product, layers[-1].weight
    for level, place in enumerate(first.places[1:]):
        for here, matrix, known, multiply, there, following in between:
            if here.units[level]:
                units = following[there.places[level]]
                multiply(matrix[here.weights[level]], known[here.known[level]], out=units)
                activate(units, out=units)
        outputs = product(weight[last.weights[level]], inputs[last.known[level]])
        part = values[place]
        values[place] = step(part, outputs.reshape(len(part), size, batch).swapaxes(1, 2))
    return values[first.head :]


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
