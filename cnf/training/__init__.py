"""The training loop: ``fit`` and what it returns."""

from cnf.training.checkpoint import CheckpointError
from cnf.training.history import History
from cnf.training.loop import TrainingError, as_device, fit
from cnf.training.update import NUMERICAL

__all__ = ["NUMERICAL", "CheckpointError", "History", "TrainingError", "as_device", "fit"]
