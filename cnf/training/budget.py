"""How much training there is to do, and how the learning rate follows it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

DEFAULT_STEPS = 3000
SETTLING = 20  # steps after which Adam knows the sizes of a new objective's gradients


class Clock:
    """Wall seconds since it was made, on top of those that an earlier run had spent."""

    def __init__(self, spent: float = 0.0):
        self._start = time.perf_counter() - spent

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


@dataclasses.dataclass(frozen=True)
class Budget:
    """One stage's share of the steps and the seconds; None where there is no such limit.

    Attributes:
        first_step: steps made before the stage.
        last_step: the stage ends after this step.
        start: seconds spent before the stage.
        end: the stage is over at this many seconds.
    """

    first_step: int
    last_step: int | None
    start: float
    end: float | None

    def progress(self, step: int, elapsed: float, reserve: float = 0.0) -> float:
        """The fraction of the budget that is spent, by steps or by seconds, whichever is more.

        >>> Budget(0, 100, 0.0, 10.0).progress(step=20, elapsed=5.0)
        0.5

        Args:
            step: steps made so far.
            elapsed: seconds so far.
            reserve: seconds to leave at the end, for what must happen after the last step.
        """
        spent = 0.0
        if self.last_step is not None:
            spent = (step - self.first_step) / max(self.last_step - self.first_step, 1)
        if self.end is not None:
            available = self.end - reserve - self.start
            share = (elapsed - self.start) / available if available > 0 else 1.0
            spent = max(spent, share)
        return min(max(spent, 0.0), 1.0)

    def finished(self, step: int, elapsed: float, reserve: float = 0.0) -> str:
        """What has run out, ``"steps"`` or ``"seconds"``, or an empty string."""
        if self.last_step is not None and step >= self.last_step:
            return "steps"
        if self.end is not None and elapsed + reserve >= self.end:
            return "seconds"
        return ""


def check(steps: int | None, seconds: float | None, shares: Sequence[float]) -> None:
    """Refuse a budget that makes no sense."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if not shares or any(not share > 0 for share in shares):
        raise ValueError(f"shares must be positive, one per objective, got {tuple(shares)}")


def stage(
    index: int,
    shares: Sequence[float],
    steps: int | None,
    seconds: float | None,
    *,
    start: tuple[int, float],
    enough: int | None = None,
) -> Budget:
    """The budget of stage ``index`` when the whole is divided by ``shares``.

    Args:
        index: which stage.
        shares: relative shares of the stages.
        steps: steps of the whole run, or None.
        seconds: seconds of the whole run, or None.
        start: the step and the seconds at which the stage starts.
        enough: steps after which the stage leaves the rest to those that follow.
    """
    part = sum(shares[: index + 1]) / sum(shares)
    first, began = start
    last = None if steps is None else max(round(steps * part), min(first + 1, steps))
    if enough is not None and index + 1 < len(shares):
        last = first + enough if last is None else min(last, first + enough)
    return Budget(
        first_step=first,
        last_step=last,
        start=began,
        end=None if seconds is None else seconds * part,
    )


def rate(progress: float, *, warmup: float, schedule: str, step: int | None = None) -> float:
    """The factor on the learning rate: a linear rise, then a constant or half a cosine.

    >>> [round(rate(p, warmup=0.1, schedule="cosine"), 3) for p in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]

    Args:
        progress: the fraction of the stage's budget that is spent.
        warmup: the fraction over which it rises.
        schedule: ``"cosine"`` or ``"constant"``, afterwards.
        step: of a stage that goes on from another's weights, how many steps it has made: the rate
            then rises over the first 20 as well, lest steps of the wrong size spoil good weights.
    """
    settled = 1.0 if step is None else min((step + 1) / SETTLING, 1.0)
    if progress < warmup:
        return settled * max(progress / warmup, 1e-3)
    if schedule == "constant":
        return settled
    return settled * 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
