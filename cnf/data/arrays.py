"""Tables as binary files: NumPy's NPY and NPZ, and Parquet."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnf.data.errors import DataError, nearest
from cnf.data.source import Numbers, Source, numbered


def open_npy(path: Path) -> Source:
    """A matrix of numbers, one number per row, or a structured array.

    Raises:
        DataError: where the file is damaged or its array is not a table of real numbers.
    """
    try:
        # a map of the file: a wrong size is found at once and unread columns cost nothing
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        _refuse_objects(path, error)
        raise DataError(f"{path}: the NPY file is damaged or cut off ({error})") from None
    return _from_array(path, loaded)


def open_npz(path: Path, key: str | None) -> Source:
    """One array of an archive, or its one-dimensional arrays of one length as named columns.

    Raises:
        DataError: where it is not clear which array is meant, and as for NPY.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as archive:
            known = list(archive.files)
            names = [key] if key is not None and key in known else known
            arrays = {name: archive[name] for name in names}
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        _refuse_objects(path, error)
        raise DataError(f"{path}: the NPZ file is damaged or cut off ({error})") from None
    if key is not None and key not in known:
        raise DataError(
            f"{path} holds no array {key!r}.{nearest(key, known)} It holds: {', '.join(known)}"
        )
    if not arrays:
        raise DataError(f"{path} holds no arrays")
    if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(
            f"{path} is an archive of files that are no arrays ({', '.join(other[:5])}); "
            "unpack it and name the file with the table"
        )
    if len(arrays) == 1:
        return _from_array(path, next(iter(arrays.values())))
    if all(a.ndim == 1 for a in arrays.values()) and len({len(a) for a in arrays.values()}) == 1:
        return _from_columns(path, arrays)
    listed = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
    raise DataError(
        f"{path} holds several arrays: {listed}; name one with --key (key=…), or save it alone"
    )


def open_parquet(path: Path) -> Source:
    """A Parquet file, by pyarrow.

    Raises:
        DataError: where the file is damaged.
        ImportError: without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'reading and writing Parquet needs pyarrow: pip install "cnf[table]"'
        ) from error

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the Parquet file is damaged or cut off ({error})") from None
    # pandas keeps its row labels in a column of this name
    fields = [f for f in file.schema_arrow if not f.name.startswith("__index_level_")]
    names = tuple(field.name for field in fields)

    def read(positions: Sequence[int]) -> Numbers:
        for position in positions:
            field = fields[position]
            kind = pyarrow.types
            if not any(
                test(field.type)
                for test in (kind.is_integer, kind.is_floating, kind.is_decimal, kind.is_boolean)
            ):
                raise DataError(_not_numbers(source, position, str(field.type)))
        try:
            loaded = file.read(columns=[names[position] for position in positions])
            columns = [
                loaded.column(names[position])
                .cast(pyarrow.float64(), safe=False)
                .to_numpy(zero_copy_only=False)
                for position in positions
            ]
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: the Parquet file is damaged ({error})") from None
        return np.stack(columns, axis=1).astype(np.float64)

    single = any(pyarrow.types.is_float32(field.type) for field in fields)
    eps = float(np.finfo(np.float32 if single else np.float64).eps)
    source = Source(path, names, True, read, _row, eps)
    return source


def _from_array(path: Path, values: NDArray[Any]) -> Source:
    if values.dtype.names is not None:
        return _from_columns(path, {name: values[name] for name in values.dtype.names})
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise DataError(
            f"{path} holds an array of shape {values.shape}; a table has shape (rows, columns): "
            "reshape it before saving"
        )
    columns = {f"x{i + 1}": values[:, i] for i in range(values.shape[1])}
    return _from_columns(path, columns, named=False)


def _from_columns(path: Path, columns: Mapping[str, NDArray[Any]], named: bool = True) -> Source:
    names = tuple(columns) if named else numbered(len(columns))

    def read(positions: Sequence[int]) -> Numbers:
        for position in positions:
            values = columns[names[position]]
            if values.dtype.kind not in "biuf" or values.ndim != 1:
                shown = f"{values.dtype} of shape {values.shape}"
                raise DataError(_not_numbers(source, position, shown))
        return np.stack([columns[names[p]].astype(np.float64) for p in positions], axis=1)

    floats = [a.dtype for a in columns.values() if a.dtype.kind == "f"]
    eps = max((float(np.finfo(kind).eps) for kind in floats), default=0.0)
    source = Source(path, names, named, read, _row, eps)
    return source


def _row(row: int, position: int) -> tuple[str, str]:
    """Rows of binary files are counted from 1; their cells say nothing beyond their value."""
    return f"row {row + 1}", ""


def _not_numbers(source: Source, position: int, kind: str) -> str:
    return (
        f"{source.path}, {source.title(position)}: holds {kind}, not real numbers; "
        "choose the columns of numbers with --columns (columns=…) or convert it before saving"
    )


def _refuse_objects(path: Path, error: Exception) -> None:
    """Name the one failure that has nothing to do with damage."""
    if "allow_pickle" in str(error) or "Python objects" in str(error):
        raise DataError(
            f"{path} holds an array of Python objects, and reading those could run code; "
            "save it as numbers: array.astype(float)"
        ) from None
