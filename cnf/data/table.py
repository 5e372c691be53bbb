"""The user's own table: read, checked, ready for a fit."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.arrays import open_npy, open_npz, open_parquet
from cnf.data.delimited import open_delimited
from cnf.data.errors import DataError, DataWarning, nearest
from cnf.data.repeats import Repeats, find_repeats, spread
from cnf.data.source import Numbers, Source
from cnf.data.writing import write_table

__all__ = ["DataError", "DataWarning", "Table", "table", "write_table"]

MINIMUM_ROWS = 20
# beyond this ratio of size to spread, float32 resolves a column to less than 1e-3 of its spread
_FAR = 1e4


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
        dequantized: the columns that noise was added to, each with the noise's width.
        key: which array of an NPZ file it is; None where there is but one.
    """

    x: Tensor
    context: Tensor | None
    columns: tuple[str, ...]
    context_columns: tuple[str, ...]
    path: Path
    dropped: int = 0
    dequantized: Mapping[str, float] = dataclasses.field(default_factory=dict)
    key: str | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        given = f" | {', '.join(self.context_columns)}" if self.context_columns else ""
        return f"Table({self.path}: {len(self)} rows of {', '.join(self.columns)}{given})"


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
    r"""Read a table of numbers from a CSV, TSV, NPY, NPZ or Parquet file and check it.

    Text files may be gzipped; their delimiter (comma, semicolon, tab, bar, blanks) and whether they
    have a header are found out. Columns without names are called x1, x2, ….

    Args:
        path: the file.
        columns: the names of the columns to read, in this order; None means all but the context's.
        context_columns: the names of the columns that a conditional density is conditioned on.
        drop_missing: leave out rows with a missing or infinite value instead of refusing them.
        dequantize: add uniform noise to the columns of whole or repeated numbers, as wide as their
            smallest step and centred, so that they have a density.
        fitting: whether a density is to be fitted to the rows. False, for rows that are only to be
            scored, waives the checks of the rows' number, of constants and of repeated values.
        minimum_rows: the least number of rows; None means 20 for a fit and 1 otherwise.
        key: which array of an NPZ file, where it holds several.
        generator: where the noise comes from; None means torch's global generator.

    Raises:
        DataError: where the file is no such table; the message names file, row and column and says
            what to do.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "plants.csv"
        >>> _ = file.write_text("name,height,weight\nash,1.25,0.5\noak,2.75,1.5\n")
        >>> plants = table(file, columns=["height", "weight"], fitting=False)
        >>> plants.x
        tensor([[1.2500, 0.5000],
                [2.7500, 1.5000]], dtype=torch.float64)
    """
    path = Path(path)
    source = _open(path, key, [*(columns or ()), *(context_columns or ())])
    names = tuple(name or f"x{i + 1}" for i, name in enumerate(source.names))
    chosen_context = _positions(source, names, context_columns or (), "context_columns")
    if columns is None:
        chosen = [i for i in range(len(names)) if i not in chosen_context]
        _refuse_duplicates(source, names, chosen)
    else:
        chosen = _positions(source, names, columns, "columns")
    if both := [names[i] for i in chosen if i in chosen_context]:
        raise DataError(f"{path}: {both[0]!r} is asked for as a column and as a context column")

    positions = chosen + chosen_context
    if not positions or not chosen:
        raise DataError(f"{path}: no column is left to read; choose one with --columns (columns=…)")
    values = source.read(positions)
    if columns is None and (idle := _idle(source, chosen, values)):
        values = np.delete(values, idle, axis=1)
        positions = [p for i, p in enumerate(positions) if i not in idle]
        chosen = [p for i, p in enumerate(chosen) if i not in idle]
        if not chosen:
            raise DataError(f"{path} holds nothing but the numbers of its rows")

    values, dropped = _complete(source, positions, names, values, drop_missing)
    least = minimum_rows if minimum_rows is not None else MINIMUM_ROWS if fitting else 1
    if len(values) < least:
        left = f" left after leaving out {dropped}" if dropped else ""
        use = "a fit needs" if fitting else "needed are"
        raise DataError(
            f"{path}: {_count(len(values), 'row')}{left}, but {use} at least {least}; "
            "give it more data"
        )

    repeats: list[Repeats] = []
    if fitting:
        _refuse_constants(source, positions, chosen, names, values)
        _warn_far(path, [names[p] for p in positions], values)
    if fitting or dequantize:
        named = [(i, names[p]) for i, p in enumerate(chosen)]
        repeats = find_repeats(values, named, source.eps)
    dequantized = {}
    if dequantize and repeats:
        values = spread(values, repeats, generator)
        dequantized = {found.name: found.step for found in repeats}
    if fitting:
        _warn_repeats(path, repeats, dequantize)

    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return Table(
        x=tensor[:, : len(chosen)].contiguous(),
        context=tensor[:, len(chosen) :].contiguous() if chosen_context else None,
        columns=tuple(names[p] for p in chosen),
        context_columns=tuple(names[p] for p in chosen_context),
        path=path,
        dropped=dropped,
        dequantized=dequantized,
        key=key,
    )


def _open(path: Path, key: str | None, wanted: Sequence[str]) -> Source:
    """The reader for what the file is, told by its first bytes, not by its name alone."""
    if not path.exists():
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
        raise DataError(f"there is no file {path}.{near}")
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.is_file())[:5]
        hint = f": {', '.join(inside)}" if inside else ""
        raise DataError(f"{path} is a directory; name a file in it{hint}")
    try:
        with open(path, "rb") as raw:
            start = raw.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    suffix = path.suffix.lower()
    if start.startswith(b"\x93NUMPY"):
        return open_npy(path)
    if start.startswith(b"PAR1"):
        return open_parquet(path)
    if start.startswith(b"PK\x03\x04") and suffix not in (".xlsx", ".xlsm", ".ods"):
        return open_npz(path, key)
    if suffix in (".xls", ".xlsx", ".xlsm", ".ods"):
        raise DataError(f"{path} is a spreadsheet; export its sheet as CSV first")
    if suffix in (".npy", ".npz", ".parquet"):
        what = "is empty" if not start else f"is no {suffix[1:].upper()} file, whatever its name"
        raise DataError(f"{path} {what}; save it anew")
    return open_delimited(path, wanted)


def _positions(
    source: Source, names: Sequence[str], wanted: Sequence[str], argument: str
) -> list[int]:
    """Where the wanted columns stand."""
    if isinstance(wanted, str):
        raise TypeError(f"{argument} is a list of names, got the string {wanted!r}")
    positions: list[int] = []
    for name in wanted:
        if name not in names:
            unnamed = "" if source.named else _unnamed(source)
            raise DataError(
                f"{source.path} has no column {name!r}.{nearest(str(name), names)} "
                f"{unnamed}Its columns: {', '.join(_shortened(names))}"
            )
        positions.append(names.index(name))
        if positions.count(positions[-1]) > 1:
            raise DataError(f"{source.path}: the column {name!r} is asked for twice in {argument}")
    _refuse_duplicates(source, names, positions)
    return positions


def _unnamed(source: Source) -> str:
    """That columns have no names; with the first row, whose cells may be meant for names."""
    cells = [source.place(0, i)[1] for i in range(min(len(source.names), 20))]
    shown = f" (its first row, {','.join(cells)}, is read as data)" if any(cells) else ""
    return f"The file names no columns{shown}. "


def _refuse_duplicates(source: Source, names: Sequence[str], positions: Sequence[int]) -> None:
    for position in positions:
        places = [i + 1 for i, name in enumerate(names) if name == names[position]]
        if len(places) > 1:
            raise DataError(
                f"{source.path}: columns {' and '.join(map(str, places))} are both called "
                f"{names[position]!r}; give each column its own name"
            )


def _idle(source: Source, chosen: Sequence[int], values: Numbers) -> list[int]:
    """Columns without a name in a file with names, when they only count the rows or are empty."""
    idle = []
    for i, position in enumerate(chosen):
        column = values[:, i]
        if source.names[position] or not len(column):
            continue
        counts = bool(np.all(np.diff(column) == 1)) and column[0] in (0, 1)
        if counts or np.isnan(column).all():
            idle.append(i)
            what = "counts the rows" if counts else "is empty"
            _warn(f"{source.path}: column {position + 1} has no name and {what}; it is left out")
    return idle


def _complete(
    source: Source,
    positions: Sequence[int],
    names: Sequence[str],
    values: Numbers,
    drop_missing: bool,
) -> tuple[Numbers, int]:
    """The rows without a gap, and how many had one."""
    finite = np.isfinite(values)
    whole = finite.all(axis=1)
    if whole.all():
        return values, 0
    bare = [i for i in range(len(positions)) if not finite[:, i].any()]
    if bare:
        raise DataError(
            f"{source.path}, {source.title(positions[bare[0]])}: no row has a value; "
            + _without([p for i, p in enumerate(positions) if i not in bare], names)
        )
    if drop_missing:
        return values[whole], int((~whole).sum())
    row = int(np.argmin(whole))
    column = int(np.argmin(finite[row]))
    where, cell = source.place(row, positions[column])
    kind = "missing" if np.isnan(values[row, column]) else "infinite"
    shown = f" ({cell!r})" if cell else ""
    raise DataError(
        f"{source.path}, {where}, {source.title(positions[column])}: the value is {kind}{shown}. "
        f"Rows with such a value: {(~whole).sum()} of {len(values)}. Leave them out with "
        "--drop-missing (drop_missing=True), or choose columns without gaps with --columns "
        "(columns=…)"
    )


def _refuse_constants(
    source: Source,
    positions: Sequence[int],
    chosen: Sequence[int],
    names: Sequence[str],
    values: Numbers,
) -> None:
    constant = [i for i in range(values.shape[1]) if (values[:, i] == values[0, i]).all()]
    if not constant:
        return
    first = constant[0]
    if positions[first] in chosen:
        why = "a constant has no density"
        way = _without([p for i, p in enumerate(chosen) if i not in constant], names)
    else:
        why, way = "a constant context tells nothing", "leave it out of --context-columns"
    raise DataError(
        f"{source.path}, {source.title(positions[first])}: every row says {values[0, first]:g}, "
        f"and {why}; {way}"
    )


def _warn_far(path: Path, names: Sequence[str], values: Numbers) -> None:
    far = np.abs(values).max(axis=0) > _FAR * values.std(axis=0)
    if far.any():
        listed = ", ".join(repr(name) for name, it in zip(names, far, strict=True) if it)
        _warn(
            f"{path}: {listed} varies little for how far it is from zero, more finely than single "
            "precision can tell apart; subtract an offset, or fit in float64"
        )


def _warn_repeats(path: Path, repeats: Sequence[Repeats], dequantized: bool) -> None:
    if dequantized:
        repeats = [found for found in repeats if found.lump]
    if not repeats:
        return
    listed = "; ".join(f"{found.name!r}: {found.what}" for found in repeats)
    lumps = any(found.lump for found in repeats)
    advice = "" if dequantized else " Spread them over their steps with --dequantize "
    advice += "" if dequantized else "(dequantize=True), or leave such columns out with --columns."
    if lumps:
        advice += (
            " A single value that stands out from a continuous column stays a peak whatever noise "
            "is added: leave its rows or its column out."
        )
    _warn(
        f"{path}: values repeat ({listed}), and a density on such columns can grow without "
        f"bound.{advice}"
    )


def _without(kept: Sequence[int], names: Sequence[str]) -> str:
    """Advice that names the columns to keep, where they are few."""
    listed = " " + ",".join(names[i] for i in kept) if 0 < len(kept) <= 20 else ""
    return f"leave it out with --columns{listed} (columns=…)"


def _shortened(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 20 else [*names[:19], f"… ({len(names)})"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _warn(message: str) -> None:
    # at the line that called table(): table -> helper -> here
    warnings.warn(message, DataWarning, stacklevel=4)
