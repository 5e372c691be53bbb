"""What a finished run is good for: ``cnf score``, ``cnf sample`` and ``cnf plot``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from cnf import plots
from cnf.cli.app import Device, DropMissing, Key, Seed, app, examples, say, usable
from cnf.data import DataError, table, targets, toy
from cnf.data.table import write_table
from cnf.objectives import guided
from cnf.runs import Source, open_run
from cnf.trial import CHUNK, draw_run

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder of cnf fit or cnf compare.")
]
SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".npy", ".npz", ".parquet")


def table_path(path: Path) -> Path:
    """Refuse a file name whose end no writer knows, before anything is computed."""
    # a name that is a dot and an end has no end to go by
    if not path.name.lstrip(".").endswith(SUFFIXES):
        raise typer.BadParameter(f"{path} should be a name and end in {', '.join(SUFFIXES)}")
    return path


TableFile = Annotated[
    Path,
    typer.Option(callback=table_path, help="File to write: .csv, .tsv, .npy, .npz or .parquet."),
]


@app.command("score", epilog=examples("cnf score runs/nsf measurements.csv --out scores.csv"))
def score_command(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A table with the run's columns, or a 2-D density.")],
    out: TableFile = Path("scores.csv"),
    drop_missing: DropMissing = False,
    key: Key = None,
    count: Annotated[
        int, typer.Option("-n", min=2, help="Points to draw, where DATA is a 2-D density.")
    ] = 10_000,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Write the log-density of every row.

    In nats and in the data's own units; prints their mean and its standard error.
    """
    fitted = open_run(run, device=usable(device))
    flow, source = fitted.flow, fitted.source
    context = None
    if data in targets():
        if source.context_columns:
            raise DataError(
                f"{run} is conditional: score a table with the columns "
                f"{', '.join(source.context_columns)}"
            )
        x = toy(data).sample(count, torch.Generator().manual_seed(seed))
    else:
        rows = table(
            data,
            columns=source.columns,
            context_columns=source.context_columns or None,
            drop_missing=drop_missing,
            key=key,
            fitting=False,
        )
        x, context = rows.x, rows.context
        if rows.dropped:
            say(f"{rows.dropped} rows without all their values are left out of {out}")
    if x.shape[-1] != flow.event_shape[0]:
        raise DataError(f"{run} is a density of {', '.join(source.columns)}, {data} has others")
    with torch.no_grad():
        scores = flow.log_prob(
            x.to(flow.device, flow.dtype),
            None if context is None else context.to(flow.device, flow.dtype),
            chunk=CHUNK,
        )
    write_table(out, ["log_prob"], scores)
    values = scores.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    typer.echo(
        f"mean log-density {float(values.mean()):.4f} ± {error:.4f} nats, {len(values)} rows"
    )
    say(f"written: {out}")


@app.command(
    "sample",
    epilog=examples(
        "cnf sample runs/nsf -n 5000 --out samples.csv",
        "cnf sample runs/by-dose -n 500 --context dose=2.5",
        "cnf sample runs/by-dose -n 1 --context-file patients.csv",
        "cnf sample runs/guided -n 500 --context dose=2.5 --guidance 2",
    ),
)
def sample_command(
    run: RunFolder,
    count: Annotated[
        int, typer.Option("-n", min=1, help="Samples; with --context-file, per row of it.")
    ] = 1000,
    out: TableFile = Path("samples.csv"),
    context: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Value of a context column; once for each."),
    ] = None,
    context_file: Annotated[
        Path | None, typer.Option(help="A table with the context columns, instead of --context.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Multiplies the spread of the base; 1 is the model.")
    ] = 1.0,
    guidance: Annotated[
        float | None,
        typer.Option(help="How often the context counts, of a fit with --optional-context."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Draw samples into a table.

    From a fit with --optional-context, without a context: from the density of all rows.
    """
    if not math.isfinite(temperature):
        raise typer.BadParameter(
            f"expected a finite number, got {temperature}", param_hint="--temperature"
        )
    fitted = open_run(run, device=usable(device))
    flow, source = fitted.flow, fitted.source
    given = None
    if context or context_file or not flow.optional_context:
        given = _context(source, context or [], context_file)
    if guidance is not None:
        try:
            flow = guided(flow, guidance)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--guidance") from None
    generator = torch.Generator(flow.device).manual_seed(seed)
    moved = None if given is None else given.to(flow.device, flow.dtype)
    if moved is not None and not moved.isfinite().all():
        held = str(flow.dtype).removeprefix("torch.")
        raise DataError(
            f"a value of the context is beyond what {held} holds; "
            "give one like those that the run was fitted to"
        )
    drawn = flow.sample(
        (count,), moved, temperature=temperature, generator=generator, chunk=CHUNK
    ).cpu()
    columns, values = list(source.columns), drawn.flatten(0, -2)
    if given is not None:
        columns += source.context_columns
        beside = given.to(values.dtype).expand(*drawn.shape[:-1], -1).flatten(0, -2)
        values = torch.cat([values, beside], -1)
    write_table(out, columns, values)
    say(f"written: {out}, {len(values)} rows of {', '.join(columns)}")


def _context(source: Source, given: list[str], file: Path | None) -> Tensor | None:
    """The context to sample at, ``(rows, context_features)``; None for an unconditional run."""
    names = source.context_columns
    if not names:
        if given or file:
            raise typer.BadParameter("this run has no context columns", param_hint="--context")
        return None
    wanted = ", ".join(f"--context {name}=…" for name in names)
    if file is not None and not given:
        rows = table(file, columns=names, fitting=False)
        return rows.x
    pairs = [item.partition("=") for item in given]
    if file is not None or sorted(name for name, _, _ in pairs) != sorted(names):
        raise typer.BadParameter(
            f"this run is conditional: give {wanted}, or --context-file", param_hint="--context"
        )
    try:
        values = {name: float(value) for name, _, value in pairs}
    except ValueError:
        values = {}
    if not values or not all(map(math.isfinite, values.values())):
        raise typer.BadParameter(
            f"the values must be finite numbers: {wanted}; got {', '.join(given)}",
            param_hint="--context",
        )
    return torch.tensor([[values[name] for name in names]], dtype=torch.float64)


@app.command("plot", epilog=examples("cnf plot runs/nsf --out nsf.png"))
def plot_command(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write (PNG); default RUN/plot.png.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Draw a run beside its data."""
    fitted = open_run(run, device=usable(device))
    path = plots.write(draw_run(fitted, name=run.name, seed=seed), out or run / "plot.png")
    say(f"written: {path}")
