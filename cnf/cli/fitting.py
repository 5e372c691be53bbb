"""Training from the command line: ``cnf compare`` and ``cnf fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cnf.cli.app import (
    Batch,
    Columns,
    ContextColumns,
    Dequantize,
    Device,
    DropMissing,
    Key,
    Seconds,
    Seed,
    Steps,
    app,
    examples,
    listed,
    say,
    usable,
)
from cnf.compare import MODELS, compare
from cnf.data import DataError
from cnf.runs import RUN, SOURCE, claim, read_source, resolve, write_run, write_source
from cnf.training import NUMERICAL
from cnf.trial import Row, measure, recipe, split, train


@app.command(
    "compare",
    epilog=examples(
        "cnf compare pinwheel",
        "cnf compare checkerboard --models nsf,maf --seconds 20",
        "cnf compare measurements.csv --columns height,weight --out runs/people",
    ),
)
def compare_command(
    target: Annotated[
        str, typer.Argument(help="A 2-D density (see: cnf targets), or a file with a table.")
    ],
    models: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help="Models (see: cnf models); +fm, +fm-only or +ml after one says how to train it.",
        ),
    ] = ",".join(MODELS),
    seconds: Seconds = None,
    steps: Steps = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default runs/TARGET.")
    ] = None,
    device: Device = "cpu",
    columns: Columns = "",
    context_columns: ContextColumns = "",
    drop_missing: DropMissing = False,
    dequantize: Dequantize = False,
    key: Key = None,
) -> None:
    """Compare models on the same data and budget.

    Trains each, tests all on the same points, prints a table, and writes results.json,
    compare.png and a run folder for each model, which score, sample and plot take. Ctrl-C keeps
    the models that were finished.
    """
    names = listed(models) or []
    if not names or len(set(names)) < len(names):
        raise typer.BadParameter("name one or more models, each once", param_hint="--models")
    data = resolve(
        target,
        columns=listed(columns),
        context_columns=listed(context_columns),
        drop_missing=drop_missing,
        dequantize=dequantize,
        key=key,
        seed=seed,
    )
    folder = out or Path("runs") / Path(target).stem
    comparison = compare(
        data,
        names,
        seconds=seconds,
        steps=steps,
        seed=seed,
        out=folder,
        device=usable(device),
        report=say,
    )
    if comparison.rows:
        typer.echo(f"{comparison}\n")
    if comparison.interrupted:
        say(f"interrupted: {len(comparison.rows)} finished models are kept in {folder}")
        raise typer.Exit(130)
    typer.echo(f"written: {folder / 'results.json'}, {folder / 'compare.png'}")
    if not comparison.flows:
        raise typer.Exit(2)


@app.command(
    "fit",
    epilog=examples(
        "cnf fit measurements.csv --model nsf --out runs/nsf",
        "cnf fit measurements.csv --context-columns dose --seconds 300 --out runs/by-dose",
        "cnf fit 2spirals --model ffjord --out runs/spirals",
        "cnf fit shares.csv --support simplex --seconds 3600 --out runs/shares --resume",
    ),
)
def fit_command(
    data: Annotated[
        str, typer.Argument(help="A file with a table, or a 2-D density (see: cnf targets).")
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[
        str, typer.Option(help="The model (see: cnf models), or e.g. ffjord+fm.")
    ] = "ffjord",
    columns: Columns = "",
    context_columns: ContextColumns = "",
    drop_missing: DropMissing = False,
    dequantize: Dequantize = False,
    key: Key = None,
    seconds: Seconds = None,
    steps: Steps = None,
    batch_size: Batch = None,
    lr: Annotated[float | None, typer.Option(min=1e-12, help="Peak learning rate.")] = None,
    objective: Annotated[
        str,
        typer.Option(metavar="A,B,…", help="Objectives, in turn (default: the model's own)."),
    ] = "",
    support: Annotated[
        str,
        typer.Option(metavar="positive|interval|simplex|LOW,HIGH", help="Where the rows lie."),
    ] = "",
    optional_context: Annotated[
        bool,
        typer.Option(
            "--optional-context",
            help="Learn the density without context too, for guidance.",
        ),
    ] = False,
    double: Annotated[
        bool, typer.Option("--double", help="Compute in double precision (float64).")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from where a fit with this --out was stopped."),
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Fit one model and write a run folder.

    A tenth of the rows is held out: the best weights on them are kept, and their mean is reported.
    With --resume, steps and seconds count from the first start.
    """
    found = resolve(
        data,
        columns=listed(columns),
        context_columns=listed(context_columns),
        drop_missing=drop_missing,
        dequantize=dequantize,
        key=key,
        seed=seed,
    )
    recipe(model, listed(objective))
    parts = split(found, seed=seed, test=False)
    folder = claim(out, RUN)
    known = resume and (folder / SOURCE).exists()
    if known and read_source(folder) != parts.source:
        raise DataError(
            f"{out} holds a fit to other data, columns, --dequantize or --seed: nothing to resume"
        )
    if not known:  # where nothing can be resumed, a finished run stays one
        write_source(folder, parts.source)
    arguments: dict[str, Any] = {}
    if support:
        arguments["support"] = _ends(support)
    if optional_context:
        arguments["optional_context"] = True
    flow, history = train(
        model,
        parts,
        seconds=seconds,
        steps=steps,
        seed=seed,
        device=usable(device),
        dtype=torch.float64 if double else torch.float32,
        batch_size=batch_size,
        lr=lr,
        objectives=listed(objective),
        arguments=arguments,
        out=folder,
        resume=resume,
    )
    try:
        row = measure(model, flow, history, parts)
    except (*NUMERICAL, FloatingPointError) as error:
        row = Row(model, steps=history.steps, train_seconds=history.seconds, error=str(error))
    tested = "test points" if parts.truth is not None else "validation rows"
    results = row.as_dict() | {"tested_on": tested, "test_size": len(parts.test)}
    write_run(folder, flow, parts.source, history, results)
    say(history.summary())
    typer.echo(f"{row.summary()}, on {len(parts.test):,} {tested}")
    typer.echo(f"written: {folder}")
    if history.stopped == "interrupted":
        raise typer.Exit(130)
    if row.error is not None:  # said above; the flow is kept all the same
        raise typer.Exit(2)


def _ends(support: str) -> str | tuple[float, float]:
    """A support's name, or its two ends.

    >>> _ends("simplex"), _ends("0, inf")
    ('simplex', (0.0, inf))
    """
    try:
        low, high = map(float, support.split(","))
    except ValueError:
        return support
    return low, high
