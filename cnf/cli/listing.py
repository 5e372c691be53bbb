"""What there is: ``cnf models`` and ``cnf targets``."""

from __future__ import annotations

import typer

from cnf.cli.app import app, examples
from cnf.compare import align
from cnf.data import targets, toy
from cnf.models import models


@app.command("models", epilog=examples("cnf models"))
def models_command() -> None:
    """List the models."""
    lines = [["model", "family", "paper"]]
    lines += [[entry.name, entry.family, entry.paper] for entry in models.values()]
    typer.echo(align(lines, numbers=False))


@app.command("targets", epilog=examples("cnf targets"))
def targets_command() -> None:
    """List the 2-D densities of known truth."""
    lines = [["target", "entropy (nats)"]]
    lines += [[name, f"{toy(name).entropy:.5f}"] for name in targets()]
    typer.echo(align(lines))
