"""Scoring the same held-out rows again and again, without letting it eat the budget."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from cnf.objectives import Batch
from cnf.objectives.base import mean
from cnf.transforms.base import Request

if TYPE_CHECKING:
    from cnf.flow import Flow

ROWS = 5_000  # more rows would not tell two checkpoints apart any better
CHUNK = 1_000
SHARE = 0.1  # of the budget, spent on validation at most
TIMES = 40  # validations per budget at most
LEAST_STEPS = 10  # between two of them
TOLERANCE = 1e-4  # of solves: far below what rows by the hundred can tell apart
FIRST_LOOK = 0.005  # of a budget in seconds may go into validating the untrained flow once


class Validator:
    """Minus the mean exact log-density of fixed rows, in nats.

    Args:
        held: the held-out rows; the first 5,000 are used.
    """

    def __init__(self, held: Batch):
        rows = min(len(held.x), ROWS)
        self.held = held.map(lambda part: part[:rows])

    def __len__(self) -> int:
        return len(self.held.x)

    def limit(self, rows: float) -> None:
        """Use no more than this many rows from now on, but at least 256 where there are."""
        count = max(256, int(min(rows, len(self))))
        self.held = self.held.map(lambda part: part[:count])

    def limit_work(self, rows: int, step_cost: float) -> None:
        """Use so few rows that validating them takes a tenth of training on ``rows`` in all.

        Args:
            rows: rows times steps.
            step_cost: densities that take as long as one training step on as many rows.
        """
        self.limit(SHARE * step_cost * rows / TIMES)

    def limit_seconds(self, flow: Flow, seconds: float) -> None:
        """Use so few rows that scoring them once, while it is easy, takes 0.5 % of the budget."""
        chunk = self.held.map(lambda part: part[:CHUNK])
        start = time.perf_counter()
        self._score(flow, chunk)
        taken = time.perf_counter() - start
        if len(self) > CHUNK:
            self.limit(len(chunk.x) * FIRST_LOOK * seconds / taken)

    def nats(self, flow: Flow) -> float:
        """The validation of the flow as it is; infinite if it has no finite value.

        Raises:
            SolverError: if a continuous flow cannot be solved.
        """
        value = self._score(flow, self.held)
        return value if math.isfinite(value) else math.inf

    @torch.no_grad()
    def _score(self, flow: Flow, rows: Batch) -> float:
        # a bound or an estimate is drawn with the same noise each time, so that validations compare
        noise = torch.Generator(device=flow.device).manual_seed(0)
        request = Request(generator=noise, tolerance=TOLERANCE)
        found = flow.evaluate(rows.x, rows.context, request, chunk=CHUNK)
        weight = None if rows.weight is None else rows.weight.double()
        return -mean(found.log_prob.double(), weight).item()


class Timetable:
    """When the next validation is due.

    A budget in seconds spends at most a tenth of itself on validation, measured by the clock; a
    budget in steps is divided evenly, so that the same seed gives the same run on any machine.

    Args:
        every: validate every so many steps, whatever it costs; None decides by itself.
        timed: whether the budget is in seconds.
        step: the step of the latest validation.
        progress: the fraction of the budget that was spent then.
    """

    def __init__(self, every: int | None, *, timed: bool, step: int, progress: float = 0.0):
        self.every = every
        self.timed = timed
        self.step = step
        self.progress = progress
        self.spent = 0.0
        self.latest = 0.0

    def due(self, step: int, progress: float, elapsed: float) -> bool:
        """Whether to validate after this step.

        Args:
            step: steps made so far.
            progress: the fraction of the budget that is spent.
            elapsed: seconds so far.
        """
        if self.every is not None:
            return step - self.step >= self.every
        if step - self.step < LEAST_STEPS or progress - self.progress < 1 / TIMES:
            return False
        return not self.timed or self.spent + self.latest <= SHARE * elapsed

    def record(self, step: int, progress: float, seconds: float) -> None:
        """Take note of a validation and of how long it took."""
        self.step, self.progress = step, progress
        self.spent += seconds
        self.latest = seconds
