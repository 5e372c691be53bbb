"""Writing scores and samples as a table, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import os
import typing
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cnf.files import write_whole

_CHUNK = 100_000


def write_table(
    path: str | os.PathLike[str], columns: Sequence[str], values: Tensor | ArrayLike
) -> Path:
    """Write named columns of numbers; the format follows the name's end.

    ``.csv`` and ``.tsv`` (also ``.gz`` of these) hold a header and the shortest digits that read
    back as the same numbers; ``.npz`` one array per column; ``.parquet`` its columns; ``.npy`` the
    bare matrix, without names.

    Args:
        path: the file to write; it appears only when it is complete.
        columns: one name per column.
        values: ``(rows, columns)``, or ``(rows,)`` for a single column.

    Returns:
        The path.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "scores.csv"
        >>> _ = write_table(path, ["log_prob"], [-1.5, -0.1])
        >>> path.read_text().split()
        ['log_prob', '-1.5', '-0.1']
    """
    path = Path(path)
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != len(columns):
        raise ValueError(
            f"expected values of shape (rows, {len(columns)}) for {len(columns)} columns, "
            f"got {tuple(array.shape)}"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected real numbers, got {array.dtype}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"expected different column names, got {', '.join(columns)}")

    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind in ([".csv"], [".tsv"]):
        delimiter = "\t" if kind == [".tsv"] else ","
        with write_whole(path) as part:
            _write_text(part, zipped, delimiter, columns, array)
    elif kind == [".npy"] and not zipped:
        # opened here: NumPy would give a device or a pipe another name
        with write_whole(path) as part, open(part, "wb") as file:
            np.save(file, array, allow_pickle=False)
    elif kind == [".npz"] and not zipped:
        with write_whole(path) as part:
            _write_npz(part, columns, array)
    elif kind == [".parquet"] and not zipped:
        with write_whole(path) as part:
            _write_parquet(part, columns, array)
    else:
        raise ValueError(
            f"{path}: expected a name that ends in .csv, .tsv, .csv.gz, .tsv.gz, .npy, .npz or "
            ".parquet"
        )
    return path


def _write_text(
    part: Path, zipped: bool, delimiter: str, columns: Sequence[str], array: NDArray[typing.Any]
) -> None:
    opener = gzip.open if zipped else open
    with opener(part, "wt", encoding="utf-8", newline="") as text:
        writer = csv.writer(
            typing.cast(typing.TextIO, text), delimiter=delimiter, lineterminator="\n"
        )
        writer.writerow(columns)
        for start in range(0, len(array), _CHUNK):
            rows = array[start : start + _CHUNK]
            # a float32 as a Python float would show digits that it does not have
            short = rows.dtype.kind == "f" and rows.dtype != np.float64
            writer.writerows((rows.astype(str) if short else rows).tolist())


def _write_npz(part: Path, columns: Sequence[str], array: NDArray[typing.Any]) -> None:
    # not by savez, which takes names as keywords, of which "file" is its own
    with zipfile.ZipFile(part, "w") as archive:
        for i, name in enumerate(columns):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array[:, i], allow_pickle=False)


def _write_parquet(part: Path, columns: Sequence[str], array: NDArray[typing.Any]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('writing Parquet needs pyarrow: pip install "cnf[table]"') from error

    data = [pyarrow.array(array[:, i]) for i in range(len(columns))]
    pyarrow.parquet.write_table(pyarrow.table(data, names=list(columns)), part)
