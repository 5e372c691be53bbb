"""What a reader hands to ``table``: named columns that can be read as numbers, and their places."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Numbers: typing.TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened table.

    Attributes:
        path: the file.
        names: the names of all its columns, ``""`` for a column that has none.
        named: whether the file gives the names; otherwise they were made up here.
        read: from column positions to numbers, ``(rows, len(positions))``; missing ones are NaN.
            Raises ``DataError`` at the first cell that is no number.
        place: where a row stands in the file, as a person counts, and what one of its cells says.
        eps: the relative precision that the file's numbers were stored with.
    """

    path: Path
    names: tuple[str, ...]
    named: bool
    read: Callable[[Sequence[int]], Numbers]
    place: Callable[[int, int], tuple[str, str]]
    eps: float = float(np.finfo(np.float64).eps)

    def title(self, position: int) -> str:
        """How messages call a column."""
        name = self.names[position]
        return f"column {position + 1}" + (f" ({name!r})" if name and self.named else "")


def numbered(count: int) -> tuple[str, ...]:
    """Names for columns that have none.

    >>> numbered(2)
    ('x1', 'x2')
    """
    return tuple(f"x{i + 1}" for i in range(count))
