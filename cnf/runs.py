"""Run folders: a flow with what it was fitted on, so that the next command can go on from it."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from cnf.data import DataError, Table, Target, table, targets, toy
from cnf.files import write_whole
from cnf.flow import Flow
from cnf.registry import unknown_name
from cnf.storage import LoadError, load
from cnf.training import History

RUN = "cnf run"
COMPARISON = "cnf comparison"
SOURCE, RESULTS = "data.json", "results.json"
Made = TypeVar("Made")


class OutputError(FileExistsError):
    """A folder that is not ours to write into."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the data of a run came from.

    Attributes:
        name: a toy's name, or a file.
        columns: the names of the features.
        context_columns: the names of the context's columns.
        seed: what the split into training and held-out rows was drawn with.
        key: which array of an NPZ file.
        dequantized: whether noise was added to the numbers.
    """

    name: str
    columns: tuple[str, ...]
    context_columns: tuple[str, ...] = ()
    seed: int = 0
    key: str | None = None
    dequantized: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    flow: Flow
    source: Source
    history: History
    results: Mapping[str, Any]


def resolve(
    name: str | Path,
    *,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
    drop_missing: bool = False,
    dequantize: bool = False,
    key: str | None = None,
    seed: int = 0,
) -> Target | Table:
    """The toy density of that name, or else the table in that file.

    Args:
        name: a toy's name or a path.
        columns: the columns of a table to model; None means all others than the context's.
        context_columns: the columns of a table to condition on.
        drop_missing: leave out a table's rows with missing or infinite values.
        dequantize: add uniform noise to a table's whole or repeated numbers.
        key: which array of an NPZ file, where it holds several.
        seed: where that noise comes from.

    Raises:
        UnknownNameError: if it is neither a toy nor looks like a file.
        DataError: if there is no such file, it is no usable table, or columns are asked of a toy.
    """
    path = Path(name)
    if str(name) in targets():
        if columns or context_columns or drop_missing or dequantize or key:
            raise DataError(
                f"{name} is a toy density: columns, context columns, dropping rows, "
                "dequantising and keys are for tables only"
            )
        return toy(str(name))
    if not path.exists() and not path.suffix and path.name == str(name):
        raise unknown_name("toy density or file", str(name), dict.fromkeys(targets()))
    return table(
        path,
        columns=columns,
        context_columns=context_columns,
        drop_missing=drop_missing,
        dequantize=dequantize,
        key=key,
        generator=torch.Generator().manual_seed(seed),
    )


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def kind(folder: str | Path) -> str | None:
    """What an earlier command left in a folder: ``RUN``, ``COMPARISON``, or None."""
    for what, file, keys in (
        (RUN, SOURCE, {"name", "columns", "seed"}),
        (COMPARISON, "results.json", {"target", "rows"}),
    ):
        try:
            said = json.loads((Path(folder) / file).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(said, dict) and keys <= said.keys():
            return what
    return None


def claim(folder: str | Path, what: str) -> Path:
    """Make a folder, or take over one that an earlier command of the same kind made.

    Raises:
        OutputError: if something else stands there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(errno.EEXIST, "is a file; choose another --out", str(folder))
    if folder.exists() and any(folder.iterdir()) and kind(folder) != what:
        raise OutputError(
            errno.EEXIST,
            f"the folder exists and is not a {what}; choose another --out, or remove it",
            str(folder),
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_run(
    folder: Path,
    flow: Flow,
    source: Source,
    history: History,
    results: Mapping[str, Any],
) -> None:
    """Fill a claimed folder: where the data came from, the flow's own files, how it went."""
    write_source(folder, source)
    flow.save(folder)
    write_json(folder / "history.json", dataclasses.asdict(history))
    write_json(folder / RESULTS, results)


def write_source(folder: Path, source: Source) -> None:
    """Note in a claimed folder where the data comes from: a run that is not finished yet."""
    (folder / RESULTS).unlink(missing_ok=True)
    write_json(folder / SOURCE, dataclasses.asdict(source))


def read_source(folder: Path) -> Source:
    """What ``write_source`` noted.

    Raises:
        LoadError: if the file is damaged.
    """

    def source(said: dict[str, Any]) -> Source:
        names = {name: tuple(said[name]) for name in ("columns", "context_columns")}
        return Source(**{**said, **names})

    return _read(folder / SOURCE, source)


def _read(path: Path, make: Callable[[dict[str, Any]], Made]) -> Made:
    """What is made of the record in a JSON file."""
    try:
        return make(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{path} is damaged ({type(error).__name__}: {error}); "
            "bring the run folder back from a copy, or fit anew with another --out"
        ) from error


def open_run(folder: str | Path, *, device: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: if there is none, or it was not finished.
        LoadError: if a file of it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such run folder", str(folder))
    if kind(folder) == COMPARISON:
        models = sorted(path.parent.name for path in folder.glob("*/data.json"))
        raise DataError(
            f"{folder} is a comparison; its runs are {', '.join(str(folder / m) for m in models)}"
        )
    if not (folder / SOURCE).exists() or not (folder / RESULTS).exists():
        raise FileNotFoundError(
            errno.ENOENT, "not a finished run (cnf fit and cnf compare make them)", str(folder)
        )
    return Run(
        load(folder, device=device),
        read_source(folder),
        _read(folder / "history.json", History.from_data),
        _read(folder / RESULTS, lambda said: {**said}),
    )
