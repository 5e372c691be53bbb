"""The application that commands enter themselves in, and what they share."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from cnf.bijections import InversionError
from cnf.data import DataError
from cnf.ode import SolverError
from cnf.registry import UnknownNameError
from cnf.storage import LoadError
from cnf.training import CheckpointError, TrainingError
from cnf.trial import RecipeError

HELP = (
    "Normalizing flows: fit a density, score it, sample from it, compare model families.\n\n"
    "Start with: cnf compare pinwheel"
)

app = typer.Typer(
    name="cnf",
    help=HELP,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(help=HELP)
def process(
    threads: Annotated[
        int,
        typer.Option(min=1, help="CPU threads; networks of this size are no faster on several."),
    ] = 1,
) -> None:
    """Set up the process that a command runs in."""
    torch.set_num_threads(threads)


Seconds = Annotated[
    float | None, typer.Option(min=0.001, help="Training time (per model); default 60.")
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Training steps (per model), instead of or beside --seconds."),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Points per training step.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Decides everything that is random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
Columns = Annotated[
    str, typer.Option(metavar="A,B,…", help="Columns of the table to model (default: all others).")
]
ContextColumns = Annotated[
    str, typer.Option(metavar="A,B,…", help="Columns of the table to condition the density on.")
]
DropMissing = Annotated[
    bool, typer.Option("--drop-missing", help="Leave out rows with missing or infinite values.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Add uniform noise to columns of whole numbers.")
]
Key = Annotated[
    str | None, typer.Option(metavar="NAME", help="Which array of an NPZ file to read.")
]


def examples(*lines: str) -> str:
    r"""Lines for the foot of a command's help, kept as they are (that is what ``\b`` says)."""
    return "\n".join(
        ["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {x}" for x in lines)]
    )


def listed(text: str) -> list[str] | None:
    """Names that were given with commas between them; None if none were.

    >>> listed("a, b"), listed("")
    (['a', 'b'], None)
    """
    return [name.strip() for name in text.split(",") if name.strip()] or None


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds the result alone."""
    typer.echo(line, err=True)


def usable(device: str) -> str:
    """The device, if there is such a one here.

    Raises:
        BadParameter: if there is not.
    """
    try:
        kind = "cpu" if device == "auto" else torch.device(device).type
    except RuntimeError:
        raise typer.BadParameter(f"{device!r} is no device", param_hint="--device") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # what the name alone does not tell; a meta tensor holds no numbers
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise typer.BadParameter(
            f"there is no device {device!r} here", param_hint="--device"
        ) from None
    return device


EXPECTED = (
    UnknownNameError,
    DataError,
    LoadError,
    SolverError,
    TrainingError,
    CheckpointError,
    RecipeError,
    FloatingPointError,
    InversionError,
    torch.linalg.LinAlgError,
    OSError,
    ImportError,
)
"""Errors that may be the user's to mend; ``explain`` knows which of them are."""


def explain(error: BaseException) -> str | None:
    """The one line to say about an error that users meet; None for one of ours."""
    if isinstance(error, OSError):
        return None if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        return str(error) if "cnf[" in str(error) else None
    return str(error)
