"""Counting the work of solves from outside."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


@dataclasses.dataclass(frozen=True)
class Stats:
    """The work of one forward solve.

    Attributes:
        nfe: evaluations of the velocity.
        accepted: accepted steps; 0 where the method does not tell (``scipy_solver``).
        rejected: rejected steps, whose evaluations are counted in ``nfe`` too.
    """

    nfe: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclasses.dataclass
class Work:
    """Sums over solves.

    Attributes:
        forward: evaluations of the velocity in forward passes.
        backward: evaluations in backward passes of the adjoint and of checkpoints; backprop has
            none, its backward pass reuses what the forward pass kept.
        accepted: accepted steps, both ways.
        rejected: rejected steps, both ways.
        solves: forward solves.
    """

    forward: int = 0
    backward: int = 0
    accepted: int = 0
    rejected: int = 0
    solves: int = 0

    def add(self, stats: Stats, direction: str) -> None:
        """Count one pass."""
        if direction == "forward":
            self.forward += stats.nfe
            self.solves += 1
        else:
            self.backward += stats.nfe
        self.accepted += stats.accepted
        self.rejected += stats.rejected


class Recorder(Work):
    """What ``count_nfe`` yields: totals, and the same per block in ``blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, Work] = {}
        # backward passes of several devices may report at once
        self._lock = threading.Lock()

    def report(self, stats: Stats, direction: str, name: str) -> None:
        """Count one pass of the block ``name``."""
        with self._lock:
            self.add(stats, direction)
            self.blocks.setdefault(name, Work()).add(stats, direction)


_RECORDERS: ContextVar[tuple[Recorder, ...]] = ContextVar("cnf_recorders", default=())


def current_recorders() -> tuple[Recorder, ...]:
    """The recorders that a solve which starts now reports to, also from its backward pass."""
    return _RECORDERS.get()


@contextmanager
def count_nfe() -> Iterator[Recorder]:
    """Count the work of every solve that starts inside.

    A solve remembers its recorders, so that its backward pass is counted on whichever thread and
    at whatever time it runs. Recorders may be nested: each counts everything inside it.

    Example:
        >>> import torch
        >>> from cnf.ode import Solver, count_nfe, integrate
        >>> with count_nfe() as nfe:
        ...     _ = integrate(
        ...         lambda t, state: (-state[0],),
        ...         (torch.ones(3),),
        ...         torch.tensor([0.0, 1.0]),
        ...         Solver("euler", step_size=0.1),
        ...     )
        >>> nfe.forward, nfe.backward, nfe.accepted
        (10, 0, 10)
    """
    recorder = Recorder()
    token = _RECORDERS.set((*_RECORDERS.get(), recorder))
    try:
        yield recorder
    finally:
        _RECORDERS.reset(token)
