"""Whatever the user has, as rows on the flow's device, split into training and validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from cnf.objectives import Batch

TARGET_ROWS = 100_000  # what is drawn from a target to train on
VALIDATION_ROWS = 10_000  # the most that are set aside for validation
LEAST_ROWS = 20  # fewer cannot be split into two meaningful parts
IN_MEMORY = 4 * 2**30  # bytes up to which a dataset is read into one tensor


class Rows(Protocol):
    """Rows that batches are taken from.

    Attributes:
        weight: None where all rows count alike.
    """

    weight: Tensor | None

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order."""

    def subset(self, indices: Tensor) -> Rows:
        """Only the rows at ``indices``."""


class TensorRows:
    """Rows that lie in memory, on the device where they are used."""

    def __init__(self, x: Tensor, context: Tensor | None = None, weight: Tensor | None = None):
        self.x = x
        self.context = context
        self.weight = weight

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order."""
        indices = indices.to(self.x.device)
        return Batch(self.x, self.context, self.weight).map(lambda t: t.index_select(0, indices))

    def subset(self, indices: Tensor) -> TensorRows:
        """Only the rows at ``indices``."""
        return TensorRows(*self.batch(indices))


class DatasetRows:
    """Rows of a map-style dataset that is too large for memory, read when they are needed."""

    def __init__(
        self, dataset: Dataset[Any], indices: Tensor, shape: Shape, weight: Tensor | None = None
    ):
        self.dataset = dataset
        self.indices = indices
        self.shape = shape
        self.weight = weight  # of the rows of the dataset, whichever of them ``indices`` names

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order."""
        chosen = self.indices[indices]
        items = [self.dataset[int(i)] for i in chosen]
        weight = None if self.weight is None else self.weight[chosen.to(self.weight.device)]
        return Batch(*self.shape.tensors(*_stack(items, self.shape.context_features > 0)), weight)

    def subset(self, indices: Tensor) -> DatasetRows:
        """Only the rows at ``indices``."""
        return DatasetRows(self.dataset, self.indices[indices], self.shape, self.weight)


class Shape:
    """What rows of data must look like to suit a flow.

    Args:
        event_shape: the shape of one row of x.
        context_features: the size of one row of context, 0 for none.
        like: a tensor with the flow's dtype and device.
        optional_context: whether NaN may stand for a context.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        context_features: int,
        like: Tensor,
        optional_context: bool = False,
    ):
        self.event_shape = tuple(event_shape)
        self.context_features = context_features
        self.optional_context = optional_context
        self.dtype = like.dtype
        self.device = like.device

    def tensors(self, x: Any, context: Any = None) -> tuple[Tensor, Tensor | None]:
        """X and context as checked tensors of the flow's dtype on its device."""
        x = self._convert(x, "data")
        if self.event_shape == (1,) and x.ndim == 1:
            x = x.unsqueeze(-1)
        if x.ndim == 0 or tuple(x.shape[1:]) != self.event_shape:
            expected = ", ".join(["rows", *map(str, self.event_shape)])
            raise ValueError(
                f"the flow takes data of shape ({expected}), got {tuple(x.shape)}; build the flow "
                "for as many features as the data has, one sample per row"
            )
        if self.context_features == 0:
            if context is not None:
                raise ValueError(
                    "a context is given, but the flow takes none; build it with context_features=…"
                )
            return x, None
        if context is None:
            raise ValueError(
                f"the flow is conditioned on {self.context_features} features, but the data has no "
                "context; pass (x, context) or context=…"
            )
        context = self._convert(context, "context", self.optional_context)
        if context.ndim == 1 and self.context_features == 1:
            context = context.unsqueeze(-1)
        if tuple(context.shape) != (len(x), self.context_features):
            raise ValueError(
                f"the context must have shape ({len(x)}, {self.context_features}), a row for each "
                f"row of the data, got {tuple(context.shape)}"
            )
        return x, context

    def weights(self, weights: Any, rows: int) -> Tensor:
        """Weights of so many rows, checked."""
        weights = self._convert(weights, "column of weights")
        if tuple(weights.shape) != (rows,):
            raise ValueError(
                f"weights must have shape ({rows},), one for each row of the data, got "
                f"{tuple(weights.shape)}"
            )
        if bool((weights < 0).any()) or not bool((weights > 0).any()):
            raise ValueError(
                f"weights must not be negative nor all zero, got {weights.min().item():g} to "
                f"{weights.max().item():g}"
            )
        return weights

    def _convert(self, values: Any, what: str, optional: bool = False) -> Tensor:
        if not isinstance(values, Tensor):
            array = np.asarray(values)
            if array.dtype.kind not in "biuf":
                raise TypeError(
                    f"the {what} must be numbers, got {type(values).__name__} of {array.dtype}; "
                    "pass a tensor or an array of floats"
                )
            values = torch.from_numpy(np.array(array))
        if values.is_complex():
            raise TypeError(f"the {what} must be real numbers, got {values.dtype}")
        given, values = values, values.detach().to(device=self.device, dtype=self.dtype)
        rows = values.flatten(1) if values.ndim > 1 else values[..., None]
        bad = torch.isinf(rows) if optional else ~torch.isfinite(rows)
        if bad.any():
            row = int(bad.any(-1).nonzero()[0])
            raise ValueError(
                f"the {what} has missing or infinite values (in {int(bad.any(-1).sum())} rows, "
                f"first in row {row}); remove those rows or fill them"
            )
        # a few values may vanish beside larger ones, but not all of a column
        vanished = (rows.abs() < torch.finfo(self.dtype).tiny).all(0)
        if len(rows) >= LEAST_ROWS and vanished.any():
            given = given.reshape(rows.shape)
            lost = (given != 0).to(self.device) & vanished
            if lost.any():
                row, column = lost.nonzero()[0].tolist()
                value = given[row, column].item()
                raise ValueError(
                    f"the {what} has a column of zeros and of values too small for {self.dtype} "
                    f"(column {column}, {value:g} in row {row}); multiply it by a constant, or "
                    "use a flow in float64"
                )
        return values


def training_and_validation(
    data: Any,
    context: Any,
    validation: Any,
    shape: Shape,
    generator: torch.Generator,
    weights: Any = None,
) -> tuple[Rows, Batch]:
    """The rows to train on, and those to validate on.

    Args:
        data: a target, tensor, array, table, dataset or ``(x, context)``.
        context: the context of data that brings none.
        validation: like data; None sets a tenth of the data aside (at most 10,000 rows), or draws
            fresh rows from a target.
        shape: what the flow takes.
        generator: where the split, and a target's samples, come from.
        weights: of the rows of data; rows of weight zero are left out.
    """
    rows = as_rows(data, context, shape, generator, TARGET_ROWS, weights)
    if validation is not None:
        held = as_rows(validation, None, shape, generator, VALIDATION_ROWS)
    elif is_target(data):
        held = as_rows(data, None, shape, generator, VALIDATION_ROWS)
    else:
        if len(rows) < LEAST_ROWS:
            raise ValueError(
                f"a fit needs at least {LEAST_ROWS} rows to split into training and validation, "
                f"got {len(rows)}; give more, or pass validation=…"
            )
        order = torch.randperm(len(rows), generator=generator)
        count = min(max(len(rows) // 10, LEAST_ROWS // 4), VALIDATION_ROWS)
        held, rows = rows.subset(order[:count]), rows.subset(order[count:])
    if len(rows) == 0 or len(held) == 0:
        raise ValueError(
            f"there are {len(rows)} rows to train on and {len(held)} to validate on; a fit needs "
            "both"
        )
    return rows, held.batch(torch.arange(min(len(held), VALIDATION_ROWS)))


def is_target(data: Any) -> bool:
    """Whether data is a density that can be sampled without end, not a sample of one."""
    return callable(getattr(data, "sample", None)) and callable(getattr(data, "log_prob", None))


def as_rows(
    data: Any,
    context: Any,
    shape: Shape,
    generator: torch.Generator,
    count: int,
    weights: Any = None,
) -> Rows:
    """Data of any kind as rows; ``count`` of them are drawn if it is a target."""
    if weights is not None and is_target(data):
        raise ValueError("a target's samples have no weights: leave weights=… away")
    own = data.weight if isinstance(data, Batch) else None
    if weights is not None and own is not None:
        raise ValueError("the batch brings its own weights: leave weights=… away")
    weights = own if weights is None else weights
    rows = _unweighted(data, context, shape, generator, count)
    if weights is None:
        return rows
    rows.weight = shape.weights(weights, len(rows))
    return rows.subset(rows.weight.nonzero().squeeze(-1).cpu())


def _unweighted(
    data: Any, context: Any, shape: Shape, generator: torch.Generator, count: int
) -> TensorRows | DatasetRows:
    """The rows of data without weights."""
    if isinstance(data, (torch.distributions.Distribution, nn.Module)):
        raise TypeError(
            f"draw the data yourself: a {type(data).__name__} takes no seeded generator, so "
            "pass data.sample((rows,))"
        )
    if is_target(data):
        x = data.sample(count, generator=generator)
    elif isinstance(data, TensorDataset):
        x, *rest = data.tensors
        context = _context(context, rest[0] if rest and shape.context_features else None)
    elif isinstance(data, Dataset):
        _context(context, data if context is not None else None)
        return _dataset_rows(data, shape)
    elif hasattr(data, "x") and hasattr(data, "context") and not hasattr(data, "to_numpy"):
        x, context = data.x, _context(context, data.context)  # a Table or a Batch
    elif isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(f"a tuple of data must be (x, context), got {len(data)} parts")
        x, context = data[0], _context(context, data[1])
    else:
        x = data
    return TensorRows(*shape.tensors(x, context))


def _context(given: Any, own: Any) -> Any:
    if given is not None and own is not None:
        raise ValueError("the data brings its own context: leave context=… away, or give x alone")
    return own if given is None else given


def _dataset_rows(dataset: Dataset[Any], shape: Shape) -> TensorRows | DatasetRows:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{type(dataset).__name__} is an iterable dataset, which cannot be split or shuffled "
            "by seed; pass a map-style dataset (with __len__ and __getitem__) or a tensor"
        )
    rows = DatasetRows(dataset, torch.arange(len(dataset)), shape)
    size = math.prod(shape.event_shape) + shape.context_features
    if len(rows) == 0 or len(rows) * size * shape.dtype.itemsize > IN_MEMORY:
        return rows
    whole = rows.batch(torch.arange(len(rows)))
    return TensorRows(whole.x, whole.context)


def _stack(items: list[Any], with_context: bool) -> tuple[Tensor, Tensor | None]:
    """Items of a dataset as x and context; what a flow without context has no use for is left."""
    pairs = [item if isinstance(item, (tuple, list)) else (item,) for item in items]
    x = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
    if not with_context or any(len(pair) < 2 for pair in pairs):
        return x, None
    return x, torch.stack([torch.as_tensor(pair[1]).flatten() for pair in pairs])


class Order:
    """Batches of row numbers without end: a new permutation for every pass over the rows.

    The generator's state at the start of the pass and the place in it are all that ``state`` needs
    to continue where another run stopped.

    >>> order = Order(4, 2, torch.Generator().manual_seed(0))
    >>> sorted(torch.cat([next(order), next(order)]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, rows: int, batch_size: int, generator: torch.Generator):
        self.rows = rows
        self.size = min(batch_size, rows)
        self.generator = generator
        self._begin(0)

    def _begin(self, place: int) -> None:
        self._state = self.generator.get_state()
        self._permutation = torch.randperm(self.rows, generator=self.generator)
        self._place = place

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._place + self.size > self.rows:
            self._begin(0)
        self._place += self.size
        return self._permutation[self._place - self.size : self._place]

    def state(self) -> tuple[Tensor, int]:
        """What ``restore`` needs to go on from here."""
        return self._state, self._place

    def restore(self, state: Tensor, place: int) -> None:
        """Go on from where ``state`` was taken."""
        self.generator.set_state(state)
        self._begin(place)
