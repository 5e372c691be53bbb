"""The commands: ``compare``, ``fit``, ``score``, ``sample``, ``plot``, ``models``, ``targets``."""

from __future__ import annotations

from cnf.cli.app import EXPECTED, app, explain
from cnf.cli.fitting import compare_command, fit_command
from cnf.cli.listing import models_command, targets_command
from cnf.cli.using import plot_command, sample_command, score_command

__all__ = [
    "EXPECTED",
    "app",
    "compare_command",
    "explain",
    "fit_command",
    "models_command",
    "plot_command",
    "sample_command",
    "score_command",
    "targets_command",
]
