"""The progress bar; silent where nobody looks or tqdm is missing."""

from __future__ import annotations

import sys
import time
from typing import Any

FORMAT = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
PERIOD = 0.2  # seconds between two drawings


class Bar:
    """A bar over the fraction of the budget that is spent.

    Args:
        show: True draws it, False does not, None draws it if stderr is a terminal.
    """

    def __init__(self, show: bool | None):
        self._bar = _tqdm() if show or (show is None and sys.stderr.isatty()) else None
        self._drawn = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to draw again."""
        return self._bar is not None and time.perf_counter() - self._drawn >= PERIOD

    def draw(
        self,
        progress: float,
        *,
        name: str,
        loss: float | None,
        validation: float | None,
        nfe: float | None,
        skipped: int,
        rate: float,
        left: float,
    ) -> None:
        """Show where training is.

        Args:
            progress: the fraction of the budget that is spent.
            name: what is being minimised.
            loss: the latest loss.
            validation: the latest validation, in nats.
            nfe: velocity evaluations per solve.
            skipped: steps that failed.
            rate: steps per second.
            left: seconds left.
        """
        if self._bar is None:
            return
        parts = [
            f"loss {loss:.4g}" if loss is not None else "",
            f"val {validation:.4f} nats" if validation is not None else "",
            f"NFE {nfe:.0f}" if nfe is not None else "",
            f"{rate:.3g} steps/s",
            f"{skipped} skipped" if skipped else "",
            f"{_duration(left)} left",
        ]
        self._bar.n = progress
        self._bar.set_description_str(name, refresh=False)
        self._bar.set_postfix_str(", ".join(part for part in parts if part))
        self._drawn = time.perf_counter()

    def close(self) -> None:
        """Leave the last drawing as it is."""
        if self._bar is not None:
            self._bar.close()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # an extra; training does not depend on being watched
        return None
    return tqdm(total=1.0, bar_format=FORMAT, file=sys.stderr, leave=True)


def _duration(seconds: float) -> str:
    """Seconds as people write them.

    >>> _duration(75), _duration(3.2)
    ('1:15', '3 s')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
