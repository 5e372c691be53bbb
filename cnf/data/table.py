"""The user's own table: reading, checking and writing it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.errors import DataError, DataWarning

__all__ = ["DataError", "DataWarning", "Table", "table"]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers from a file, checked.

    Attributes:
        x: the rows, ``(rows, columns)``, float64.
        context: what a conditional density is conditioned on, ``(rows, context_columns)``, or None.
        columns: the names of the columns of ``x``.
        context_columns: the names of the columns of ``context``.
        path: the file that the table was read from.
        dropped: how many rows were left out because something in them was missing or infinite.
    """

    x: Tensor
    context: Tensor | None
    columns: tuple[str, ...]
    context_columns: tuple[str, ...]
    path: Path
    dropped: int = 0


def table(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
    drop_missing: bool = False,
    dequantize: bool = False,
    fitting: bool = True,
    minimum_rows: int | None = None,
    key: str | None = None,
    generator: torch.Generator | None = None,
) -> Table:
    """Read a table of numbers from a file."""
    values = torch.from_numpy(np.load(path, allow_pickle=False)).double()
    names = tuple(f"x{i + 1}" for i in range(values.shape[-1]))
    return Table(values, None, names, (), Path(path))
