"""The training loop: ``fit`` and what it returns."""

from cnf.training.history import History
from cnf.training.loop import TrainingError, fit

__all__ = ["History", "TrainingError", "fit"]
