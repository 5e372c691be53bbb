"""The record of a training run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(repr=False)
class History:
    """What happened during training; plain data that turns into JSON and back.

    Attributes:
        losses: (step, seconds, loss), the loss averaged over the steps since the entry before.
        validations: (step, seconds, nats), minus the mean log-density of the validation rows under
            the averaged weights; only finite ones are listed.
        best_step: the step whose weights the flow now has; None if no validation was finite.
        best_validation: their validation, in nats; None if no validation was finite.
        steps: steps tried, the skipped ones included.
        seconds: wall time from the first step to the end, validation included.
        skipped: steps that changed nothing because they failed.
        failures: how many steps (or validations) failed, by what went wrong.
        stopped: why training ended: ``"steps"``, ``"seconds"``, ``"patience"``, ``"failures"`` or
            ``"interrupted"``; empty while it runs.
        nfe: velocity evaluations per forward solve while training; None without a solve.
        stages: (objective, the step it started at), one entry per objective.

    Example:
        >>> history = History(losses=[(1, 0.5, 2.0)], steps=1, seconds=0.5, stopped="steps")
        >>> History.from_json(history.to_json()) == history
        True
    """

    losses: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    validations: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    best_step: int | None = None
    best_validation: float | None = None
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    stopped: str = ""
    nfe: float | None = None
    stages: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        """The whole record as JSON text."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """Undo ``to_json``."""
        return cls.from_data(json.loads(text))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> History:
        """The record whose ``dataclasses.asdict`` has been through JSON."""
        entries = {
            name: [tuple(entry) for entry in data[name]]
            for name in ("losses", "validations", "stages")
        }
        return cls(**{**data, **entries})

    def summary(self) -> str:
        """One line for people.

        >>> History(steps=20, seconds=2.0, stopped="steps").summary()
        '20 steps in 2.0 s (10 steps/s), stopped by steps'
        """
        rate = self.steps / self.seconds if self.seconds else 0.0
        parts = [f"{self.steps} steps in {self.seconds:.1f} s ({rate:.3g} steps/s)"]
        if self.best_validation is not None:
            parts.append(f"validation {self.best_validation:.4f} nats at step {self.best_step}")
        if self.nfe is not None:
            parts.append(f"NFE {self.nfe:.1f}")
        if self.skipped:
            parts.append(f"{self.skipped} steps skipped")
        if self.failures:
            parts.append(", ".join(f"{count} × {name}" for name, count in self.failures.items()))
        parts.append(f"stopped by {self.stopped}" if self.stopped else "running")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"History({self.summary()})"
