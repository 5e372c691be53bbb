"""The contract of an objective: a module that owns a flow and turns a batch into a loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cnf.flow import Flow


MISSING = (
    "this needs a conditional flow whose context may be missing: build it with context_features=… "
    "and optional_context=True, or by hand with a field for one more context feature and "
    "encoder=cnf.nets.OptionalContext()"
)


class Batch(NamedTuple):
    """Rows to learn from.

    Attributes:
        x: data, ``(rows, *event)``.
        context: what the flow is conditioned on, ``(rows, context_features)``, or None.
        weight: non-negative weights of the rows, ``(rows,)``; only their ratios matter.
    """

    x: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None

    def repeated(self, times: int) -> Batch:
        """The rows so many times over."""
        return self if times == 1 else self.map(lambda part: torch.cat([part] * times))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same function of every part that there is."""
        context, weight = (None if part is None else function(part) for part in self[1:])
        return Batch(function(self.x), context, weight)


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
        total: the scalar to minimise.
        terms: its parts before weighting, detached scalars, for people to read.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """A loss of a flow; calling it on a batch returns a :class:`Loss`.

    Attributes:
        flow: the flow that is trained. An objective may have parameters of its own beside it.
        optimizer: the optimiser that suits it, ``"adamw"`` or ``"muon"``, unless ``fit`` is told
            another.
        lr: the peak learning rate that suits it, likewise.
        share: what it takes of the budget, relative to other objectives that ``fit`` runs in turn.
        enough: steps after which an objective that follows brings more; None for no such number.
        step_cost: how many densities take as long as one training step on as many rows.
    """

    flow: Flow
    optimizer: str = "adamw"
    lr: float = 5e-3
    share: float = 1.0
    enough: int | None = None
    step_cost: float = 3.0

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    @abstractmethod
    def forward(
        self, batch: Batch, *, generator: torch.Generator | None = None, progress: float = 0.0
    ) -> Loss:
        """The loss of one batch.

        Args:
            batch: the rows.
            generator: where noise comes from, on the flow's device; None means torch's global one.
            progress: the fraction of the training budget that is spent, for schedules.
        """


def without_context(context: Tensor, fraction: float, generator: torch.Generator | None) -> Tensor:
    """The context with that fraction of its rows, chosen at random, replaced by NaN."""
    if not fraction:
        return context
    chance = torch.rand(len(context), 1, generator=generator, device=context.device)
    return torch.where(chance < fraction, math.nan, context)


def dropped_fraction(flow: Flow, fraction: float | None) -> float:
    """What share of the contexts training drops; None means a tenth where one may be missing.

    Raises:
        ValueError: if the flow cannot do without its context, or the share is none.
    """
    if fraction is None:
        return 0.1 if flow.optional_context else 0.0
    if not 0 <= fraction < 1:
        raise ValueError(f"drop_context must lie in [0, 1), got {fraction}")
    if fraction and not flow.optional_context:
        raise ValueError(MISSING)
    return fraction


def mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over the batch, weighted if weights are given."""
    return values.mean() if weight is None else (values * weight).sum() / weight.sum()
