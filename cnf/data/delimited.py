"""Tables as text: comma, semicolon, tab, bar or blanks between the cells, plain or gzipped.

NumPy's C loader reads a clean file; only what it refuses is walked through cell by cell, to find
the place that is wrong or to collect the cells that are missing.
"""

from __future__ import annotations

import array
import collections
import contextlib
import csv
import dataclasses
import gzip
import itertools
import typing
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cnf.data.errors import DataError
from cnf.data.source import Numbers, Source, numbered

MISSING = frozenset(
    ("", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "missing", "?", "-", ".")
)
BLANKS = " "
_PREVIEW_LINES = 100
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a text file is to be read.

    Attributes:
        path: the file.
        zipped: whether it is gzipped.
        encoding: the codec of its text.
        delimiter: what separates cells; a blank stands for any run of white space.
        names: the names of the columns.
        named: whether the file gives them.
        skip: how many lines stand before the first row of numbers.
    """

    path: Path
    zipped: bool
    encoding: str
    delimiter: str = ","
    names: tuple[str, ...] = ()
    named: bool = False
    skip: int = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[typing.TextIO]:
        """The text, line ends as they are; what cannot be decoded is a ``DataError``."""
        opener = gzip.open if self.zipped else open
        try:
            with opener(self.path, "rt", encoding=self.encoding, newline="") as text:
                yield typing.cast(typing.TextIO, text)
        except UnicodeError:
            raise DataError(self._undecodable()) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path}: the gzip file is damaged or cut off ({error}); write or copy it anew"
            ) from None

    def rows(self, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Line number (from 1) and cells of every line that is not blank, ``skip`` lines on."""
        with self.opened() as text:
            lines = itertools.islice(text, skip, None)
            if self.delimiter == BLANKS:
                for number, line in enumerate(lines, skip + 1):
                    if cells := [cell.strip('"') for cell in line.split()]:
                        yield number, cells
                return
            reader = csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True)
            start = skip + 1
            try:
                for cells in reader:
                    if cells and cells != [""]:
                        yield start, cells
                    start = skip + reader.line_num + 1
            except csv.Error as error:
                raise DataError(
                    f"{self.path}, line {start}: not a row of a table ({error}); "
                    'look for an unbalanced " there'
                ) from None

    def _undecodable(self) -> str:
        """The message for a line that is not text in this encoding."""
        opener = gzip.open if self.zipped else open
        with opener(self.path, "rb") as raw:
            for number, line in enumerate(raw, 1):
                try:
                    line.decode(self.encoding)
                except UnicodeDecodeError as error:
                    if self.encoding.startswith("utf-8"):
                        return (
                            f"{self.path}, line {number}: the byte 0x{line[error.start]:02x} is "
                            "not UTF-8 text; save the file with UTF-8 encoding"
                        )
                    break
        return f"{self.path}: the text is not in its {self.encoding} encoding; save it as UTF-8"


def open_delimited(path: Path, wanted: Sequence[str] = ()) -> Source:
    """Find out how a text file is written.

    Args:
        path: the file.
        wanted: names of columns that are asked for; a first row that holds them is the header.

    Raises:
        DataError: where it is empty, binary, not decodable, or has no row.
    """
    dialect = _sniff(path, wanted)
    return Source(
        path=path,
        names=dialect.names,
        named=dialect.named,
        read=lambda positions: _read(dialect, positions),
        place=lambda row, position: _place(dialect, row, position),
    )


def is_number(cell: str) -> bool:
    """Whether a cell is a number as both NumPy and Python read it.

    >>> [is_number(cell) for cell in ("1e-3", "inf", "1_000", "1,5", "")]
    [True, True, False, False, False]
    """
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _sniff(path: Path, wanted: Sequence[str]) -> Dialect:
    """Encoding, delimiter and header of a file, from its first lines."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    start = _start(path, zipped)
    utf16 = start.startswith(_UTF16)
    if not utf16 and b"\0" in start:
        raise DataError(
            f"{path} is a binary file, not a table of text; "
            "readable are CSV, TSV, NPY, NPZ and Parquet"
        )
    if not start.strip():
        raise DataError(f"{path} is empty")
    bare = Dialect(path, zipped, "utf-16" if utf16 else "utf-8-sig")
    with bare.opened() as text:
        lines = list(itertools.islice(text, _PREVIEW_LINES))
    comments = sum(1 for _ in itertools.takewhile(lambda s: s.startswith("#"), lines))
    body = lines[comments:]
    dialect = dataclasses.replace(bare, delimiter=_delimiter(body, path))

    numbered_rows = list(itertools.islice(dialect.rows(comments), 3))
    if not numbered_rows:
        raise DataError(f"{path} has no rows")
    first = [[cell.strip() for cell in cells] for _, cells in numbered_rows]
    if _is_header(first, wanted):
        line, after = numbered_rows[0][0], numbered_rows[1:2]
        # a name may hold a line end, so the next row tells where the header stops
        skip = after[0][0] - 1 if after else line
        return dataclasses.replace(dialect, names=tuple(first[0]), named=True, skip=skip)
    width = len(first[0])
    # np.savetxt writes the names as a comment
    last = lines[comments - 1].lstrip("#").strip() if comments else ""
    for delimiter in (dialect.delimiter, ",", BLANKS):
        names = tuple(_split(last, delimiter))
        if len(names) == width and not any(map(is_number, names)):
            return dataclasses.replace(dialect, names=names, named=True, skip=comments)
    return dataclasses.replace(dialect, names=numbered(width), skip=comments)


def _start(path: Path, zipped: bool) -> bytes:
    """The first bytes, unpacked."""
    opener = gzip.open if zipped else open
    try:
        with opener(path, "rb") as raw:
            return raw.read(1 << 16)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error})") from None


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == BLANKS:
        return line.split()
    try:
        row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:  # ``rows`` says where, if this line is read at all
        row = [line]
    return [cell.strip() for cell in row]


def _delimiter(lines: Sequence[str], path: Path) -> str:
    """The separator that cuts most lines into the same number of cells, most of them numbers."""
    lines = [line for line in lines if line.strip()]
    suffixes = [suffix.lower() for suffix in path.suffixes]
    order = [";", "\t", ",", "|", BLANKS]
    if ".tsv" in suffixes:
        order = ["\t", *order]
    best, best_score = ("\t" if ".tsv" in suffixes else ","), 0.0
    for delimiter in order:
        rows = [_split(line, delimiter) for line in lines]
        widths = collections.Counter(map(len, rows[1:] or rows))
        width = widths.most_common(1)[0][0] if widths else 1
        if width == 1:
            continue
        agreeing = sum(len(row) == width for row in rows)
        cells = [cell for row in rows[1:] or rows for cell in row if cell]
        # a decimal comma is refused later, but it must not be taken for a separator here
        points = [cell.replace(",", ".") if delimiter != "," else cell for cell in cells]
        numbers = sum(map(is_number, points)) / max(1, len(cells))
        score = agreeing / len(rows) * (numbers + 0.01)
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _is_header(rows: Sequence[Sequence[str]], wanted: Sequence[str]) -> bool:
    """Whether the first row names the columns.

    It does when it holds all the wanted names, or a word and some of them; when no cell of it is a
    number and some cell is a word, when it has a word where the next row has a number, or when it
    counts 0, 1, 2, … as pandas numbers columns without names.
    """
    first = rows[0]
    words = [not is_number(cell) and cell.lower() not in MISSING for cell in first]
    found = [name in first for name in wanted]
    if found and (all(found) or (any(words) and any(found))):
        return True
    if any(words):
        if not any(map(is_number, first)):
            return True
        following = rows[1] if len(rows) > 1 else []
        return any(word and is_number(cell) for word, cell in zip(words, following, strict=False))
    counted = list(first[1:] if first[0] == "" else first)
    counts = [str(i) for i in range(len(counted))]
    return len(rows) > 1 and len(counted) > 1 and counted == counts and list(rows[1]) != counts


def _read(dialect: Dialect, positions: Sequence[int]) -> Numbers:
    """The chosen columns as numbers, missing ones NaN."""
    wanted = set(positions)
    width = len(dialect.names)
    # columns that nobody asked for are read as one letter: cheap, and their number is checked
    kind = [(f"f{i}", "f8" if i in wanted else "U1") for i in range(width)]
    try:
        with dialect.opened() as text:
            lines = itertools.islice(text, dialect.skip, None)
            start = next((line for line in lines if line.strip()), None)
            if start is None:
                raise DataError(f"{dialect.path} has column names but no rows below them")
            loaded = np.loadtxt(
                itertools.chain([start], lines),
                dtype=np.float64 if len(wanted) == width else kind,
                delimiter=None if dialect.delimiter == BLANKS else dialect.delimiter,
                comments=None,
                quotechar='"',
                ndmin=2 if len(wanted) == width else 1,
            )
    except DataError:
        raise
    except ValueError:
        return _read_slowly(dialect, positions)
    if loaded.dtype.names is None:
        if loaded.shape[1] != width:
            return _read_slowly(dialect, positions)
        return loaded[:, list(positions)]
    return np.stack([loaded[f"f{i}"] for i in positions], axis=1)


def _read_slowly(dialect: Dialect, positions: Sequence[int]) -> Numbers:
    """The same, cell by cell, with the line and column of what is no number."""
    width = len(dialect.names)
    every = list(positions) == list(range(width))
    numbers = array.array("d")
    for line, cells in dialect.rows(dialect.skip):
        if len(cells) != width:
            raise DataError(_ragged(dialect, line, cells))
        chosen = cells if every else [cells[position] for position in positions]
        try:
            # most rows are clean; Python alone would read 1_000 as a number
            row = list(map(float, chosen))
            clean = "_" not in "".join(chosen)
        except ValueError:
            clean = False
        numbers.extend(row if clean else _gaps(dialect, line, cells, positions))
    return np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(positions)).copy()


def _gaps(
    dialect: Dialect, line: int, cells: Sequence[str], positions: Sequence[int]
) -> Iterator[float]:
    """The chosen numbers of a row in which something is missing or is no number."""
    cells = [cell.strip() for cell in cells]
    for position in positions:
        if is_number(cells[position]):
            yield float(cells[position])
        elif cells[position].lower() in MISSING:
            yield np.nan
        else:
            raise DataError(_text(dialect, line, position, cells))


def _ragged(dialect: Dialect, line: int, cells: Sequence[str]) -> str:
    expected = "its names" if dialect.named else "the first row"
    width = len(dialect.names)
    return (
        f"{dialect.path}, line {line}: {len(cells)} cell{'s' * (len(cells) != 1)}, but {expected} "
        f"say{'s' * (not dialect.named)} {width} column{'s' * (width != 1)}; "
        "every row needs one cell per column (empty where a value is missing)"
    )


def _text(dialect: Dialect, line: int, position: int, cells: Sequence[str]) -> str:
    name = dialect.names[position]
    title = f"column {position + 1}" + (f" ({name!r})" if dialect.named and name else "")
    cell = cells[position]
    if is_number(cell.replace(",", ".", 1)) or is_number(cell.replace(",", "").replace(" ", "")):
        advice = "write numbers with a decimal point and nothing between thousands"
    else:
        places = [i for i, c in enumerate(cells) if is_number(c)]
        numeric = [dialect.names[i] for i in places]
        advice = "choose the columns of numbers with --columns (columns=…)"
        if numeric and all(numeric) and len(numeric) <= 20:
            advice += f", on this line {','.join(numeric)}"
            if not dialect.named:  # names that are numbers, such as years, look like a row
                first = next(dialect.rows(dialect.skip))[1]
                titles = [first[i].strip() for i in places]
                advice += f", or {','.join(titles)} if the first row names the columns"
    shown = cell if len(cell) <= 40 else cell[:37] + "…"
    return f"{dialect.path}, line {line}, {title}: {shown!r} is text, not a number; {advice}"


def _place(dialect: Dialect, row: int, position: int) -> tuple[str, str]:
    """The line of the ``row``-th row of numbers, and one cell of it."""
    line, cells = next(itertools.islice(dialect.rows(dialect.skip), row, None))
    return f"line {line}", cells[position].strip()
