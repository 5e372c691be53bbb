"""Counting the work of solves from outside."""

from __future__ import annotations

import dataclasses
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


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

    def work(self, direction: str) -> Work:
        """The same as a recorder counts it, of a pass that went ``"forward"`` or back."""
        if direction == "forward":
            return Work(self.nfe, 0, self.accepted, self.rejected, 1)
        return Work(0, self.nfe, self.accepted, self.rejected)


@dataclasses.dataclass
class Work:
    """Sums over solves.

    Attributes:
        forward: evaluations of the velocity in forward passes.
        backward: evaluations in backward passes of the adjoint and of checkpoints; backprop has
            none, its backward pass reuses what the forward pass kept.
        accepted: accepted steps, both ways.
        rejected: rejected steps, both ways.
        solves: forward solves; a batch that is solved in groups (``Solver.rows``) counts as one.
    """

    forward: int = 0
    backward: int = 0
    accepted: int = 0
    rejected: int = 0
    solves: int = 0

    def add(self, other: Work) -> None:
        """Count other work, too."""
        self.forward += other.forward
        self.backward += other.backward
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.solves += other.solves


class Recorder(Work):
    """What ``count_nfe`` yields: totals, and the same per block in ``blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, Work] = {}
        # backward passes of several devices may report at once
        self._lock = threading.Lock()

    def report(self, work: Work, name: str) -> None:
        """Count work of the block ``name``."""
        with self._lock:
            self.add(work)
            self.blocks.setdefault(name, Work()).add(work)


class Together:
    """Solves of groups of one batch, which recorders count as one.

    Of every count they are told the largest that a group has: a batch's NFE is how often the
    velocity was evaluated at any of its samples.
    """

    def __init__(self) -> None:
        self._recorders = current_recorders()
        self._groups: list[Work] = []
        self._told = dataclasses.astuple(Work())
        self._lock = threading.Lock()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Count what solves inside as the next group's, also their backward passes."""
        group = Work()
        self._groups.append(group)
        token = _RECORDERS.set((_Group(self, group),) if self._recorders else ())
        try:
            yield
        finally:
            _RECORDERS.reset(token)

    def report(self, group: Work, work: Work, name: str) -> None:
        """Count a group's work, and tell by how much the largest has grown."""
        with self._lock:
            group.add(work)
            counts = zip(*map(dataclasses.astuple, self._groups), strict=True)
            largest = tuple(map(max, counts))
            grown = Work(*map(operator.sub, largest, self._told))
            self._told = largest
        for recorder in self._recorders:
            recorder.report(grown, name)


class _Group(NamedTuple):
    """What counts for one group."""

    together: Together
    work: Work

    def report(self, work: Work, name: str) -> None:
        self.together.report(self.work, work, name)


_RECORDERS: ContextVar[tuple[Recorder | _Group, ...]] = ContextVar("cnf_recorders", default=())


def current_recorders() -> tuple[Recorder | _Group, ...]:
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
