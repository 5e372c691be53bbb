"""Model families beside each other: the same data, the same budget, the same metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnf import plots
from cnf.data import Table, Target
from cnf.flow import Flow
from cnf.runs import COMPARISON, RUN, claim, resolve, write_json, write_run
from cnf.training import NUMERICAL, History, TrainingError
from cnf.trial import (
    Row,
    Split,
    data_panel,
    held_out,
    measure,
    model_panel,
    recipe,
    split,
    train,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("ffjord", "realnvp", "maf", "nsf")
"""What a comparison compares unless told otherwise."""


@dataclasses.dataclass(eq=False)
class Comparison:
    """What a comparison found; grows by a row per model.

    Attributes:
        data: what the models were trained and tested on.
        rows: one per model, in the order asked for.
        flows: the trained flows, by the name asked for.
        histories: how their training went.
        panels: the columns of the picture.
        interrupted: whether it was stopped before every model had its turn.
    """

    data: Split
    rows: list[Row] = dataclasses.field(default_factory=list)
    flows: dict[str, Flow] = dataclasses.field(default_factory=dict)
    histories: dict[str, History] = dataclasses.field(default_factory=dict)
    panels: list[plots.Panel] = dataclasses.field(default_factory=list)
    interrupted: bool = False

    @property
    def target(self) -> str:
        """The toy's name, or the file's."""
        return self.data.source.name

    @property
    def entropy(self) -> float | None:
        """The entropy of the target in nats, which no model's mean nll can go below; or None."""
        return None if self.data.target is None else float(self.data.target.entropy)

    def as_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return {
            "target": self.target,
            "entropy": self.entropy,
            "test_size": len(self.data.test),
            "rows": [row.as_dict() for row in self.rows],
        }

    def write(self, folder: Path) -> None:
        """Write ``results.json`` and ``compare.png``, each whole or not at all."""
        write_json(folder / "results.json", self.as_dict())
        plots.write(self.figure(), folder / "compare.png")

    def figure(self) -> Figure:
        """The picture: densities on one colour scale, samples, held-out nats over time."""
        known = "" if self.entropy is None else f", entropy {self.entropy:.4f} nats"
        return plots.comparison(
            self.panels,
            [held_out(name, history) for name, history in self.histories.items()],
            bounds=self.data.bounds,
            columns=() if self.data.target is not None else self.data.source.columns,
            truth=self.entropy,
            title=f"{Path(self.target).name}{known}",
        )

    def __str__(self) -> str:
        """The table as aligned plain text, under a line that says what of."""
        known = "" if self.entropy is None else f", entropy {self.entropy:.4f} nats"
        title = f"{self.target}: {len(self.data.test):,} test points{known}; nll and gap in nats"
        return f"{title}\n\n{align(self._cells())}"

    def markdown(self) -> str:
        """The table as a README holds it."""
        header, *lines = self._cells()
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))

    def _cells(self) -> list[list[str]]:
        known = self.data.truth is not None
        header = ["model", "nll", "± se", *(["gap", "± se"] if known else [])]
        header += ["steps", "train", "NFE", "score/s", "draw/s", "x err", "params"]
        return [header] + [_cells(row, known) for row in self.rows]


def align(lines: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Columns of text, the first to the left, the others to the right if they are numbers.

    A line of two cells only is a name and a remark; it does not widen the columns.

    >>> print(align([["model", "nll"], ["nsf", "1.25"]]))
    model   nll
    nsf    1.25
    """
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in full) for i in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for line in lines:
        if len(line) < len(lines[0]):
            text.append("  ".join([line[0].ljust(widths[0]), *line[1:]]))
            continue
        pairs = list(zip(line, widths, strict=True))
        cells = [cell.rjust(w) if numbers else cell.ljust(w) for cell, w in pairs[1:]]
        text.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(text)


def _cells(row: Row, known: bool) -> list[str]:
    if row.error is not None:
        return [row.model, f"failed: {row.error}"]
    numbers = [_number(row.test_nll, ".4f"), _number(row.test_nll_stderr, ".4f")]
    if known:
        numbers += [_number(row.gap, ".4f"), _number(row.gap_stderr, ".4f")]
    return [
        row.model,
        *numbers,
        _short(row.steps),
        _number(row.train_seconds, ".0f") + " s",
        _number(row.nfe, ".0f"),
        _short(row.log_prob_per_second),
        _short(row.samples_per_second),
        _number(row.inverse_error, ".0e"),
        _short(row.parameters),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(value: float | None) -> str:
    """Three digits of a large number.

    >>> _short(71_512), _short(1_234_567), _short(9_876)
    ('71.5k', '1.23M', '9876')
    """
    if value is None:
        return "-"
    if value < 10_000:
        return f"{value:.0f}"
    size, letter = next(unit for unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= unit[0])
    return f"{value / size:.3g}{letter}"


def compare(
    target: str | Path | Target | Table,
    models: Sequence[str] = MODELS,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    train_size: int = 100_000,
    test_size: int = 50_000,
    progress: bool | None = None,
    report: Callable[[str], None] | None = None,
) -> Comparison:
    """Train models on the same data within the same budget, and test them on the same points.

    A model that fails becomes a row that says why. An interrupt (Ctrl-C) ends the comparison; what
    was finished is returned, and stays written.

    Args:
        target: a toy's name, a file, a target or a table.
        models: names of models; ``"ffjord+ml"`` also says how to train it.
        seconds: training time for each model; a minute if ``steps`` is not given either.
        steps: training steps for each model.
        seed: decides data, splits, initial weights and batches.
        out: a folder for ``results.json``, ``compare.png`` and a run folder per model; each is
            written as soon as a model is finished.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        batch_size: points per step; None leaves it to ``fit``.
        train_size: points to train on, for a target.
        test_size: points to test on, for a target.
        progress: whether to show a progress bar per model; None shows it on a terminal.
        report: called with a line of text when a model starts and when it ends.

    Raises:
        UnknownNameError: for a model or a target that does not exist.
        OutputError: if ``out`` holds something else than a comparison.
    """
    names = list(models)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"models must be one or more different names, got {names}")
    for name in names:
        recipe(name)
    if out is not None:
        plots.require()
    found = resolve(target) if isinstance(target, (str, Path)) else target
    data = split(found, seed=seed, train_size=train_size, test_size=test_size)
    comparison = Comparison(data)
    folder = None if out is None else claim(out, COMPARISON)
    tell = report or (lambda line: None)
    try:
        if folder is not None:
            write_json(folder / "results.json", comparison.as_dict())
        comparison.panels.append(data_panel(data))
        for i, name in enumerate(names):
            tell(f"{name}: training ({i + 1} of {len(names)})")
            row = _run(
                comparison,
                name,
                folder=folder,
                seconds=seconds,
                steps=steps,
                seed=seed,
                device=device,
                batch_size=batch_size,
                progress=progress,
            )
            if folder is not None:
                comparison.write(folder)
            tell(row.summary())
    except KeyboardInterrupt:
        comparison.interrupted = True
    return comparison


def _run(
    comparison: Comparison,
    name: str,
    *,
    folder: Path | None,
    seconds: float | None,
    steps: int | None,
    seed: int,
    device: str,
    batch_size: int | None,
    progress: bool | None,
) -> Row:
    """One model's turn: train, measure, draw, and write its run folder."""
    data = comparison.data
    try:
        flow, history = train(
            name,
            data,
            seconds=seconds,
            steps=steps,
            seed=seed,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
        if history.stopped == "interrupted":
            raise KeyboardInterrupt
        row = measure(name, flow, history, data)
        shown = model_panel(name, flow, data, seed=seed, note=row.note)
    except (*NUMERICAL, TrainingError, FloatingPointError) as error:
        row = Row(name, error=str(error))
        comparison.rows.append(row)
        return row
    if folder is not None:
        inside = claim(folder / name, RUN)
        write_run(inside, flow, data.source, history, row.as_dict())
    comparison.rows.append(row)
    comparison.flows[name] = flow
    comparison.histories[name] = history
    comparison.panels.append(shown)
    return row
