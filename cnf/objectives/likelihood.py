"""Maximum likelihood, with penalties on the path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from cnf.divergence import event_dims
from cnf.objectives.base import (
    Batch,
    Loss,
    Objective,
    dropped_fraction,
    mean,
    without_context,
)
from cnf.transforms import Continuous
from cnf.transforms.base import Request

if TYPE_CHECKING:
    from cnf.costs import Cost
    from cnf.divergence import Divergence
    from cnf.flow import Flow


class MaximumLikelihood(Objective):
    """Minus the mean log-likelihood in nats, plus weighted integrals along the path.

    ``total = Σᵢ wᵢ (−log p(xᵢ | cᵢ) + Σ_cost weight(progress) · costᵢ) / Σᵢ wᵢ``.

    Args:
        flow: the flow to train.
        divergence: the trace estimator to train a continuous flow with, for instance
            ``Hutchinson()`` as in FFJORD; None means the model's own.
        costs: path costs with their weights; a weight is a number or a function of the fraction of
            the training budget that is spent. RNODE (Finlay et al. 2020, arXiv:2002.02798) is
            ``{KineticEnergy(): 0.01, JacobianNorm(): 0.01}``.
        tolerance: rtol and atol of a continuous flow's solves while it is trained, which need less
            accuracy than a density that is reported; None means the model's own.
        end_time_spread: STEER (Ghosh et al. 2020, arXiv:2006.10711): each batch runs the clock of
            continuous flows faster or slower by a factor uniform in ``1 ± end_time_spread``.
        drop_context: the fraction of rows whose context is replaced by NaN, "not given"; None means
            a tenth for a flow whose context is optional, none for others.

    Example:
        >>> import cnf
        >>> flow = cnf.realnvp(2)
        >>> loss = cnf.MaximumLikelihood(flow)(cnf.Batch(torch.zeros(4, 2)))
        >>> bool(torch.isclose(loss.total, -flow.log_prob(torch.zeros(2))))
        True
    """

    def __init__(
        self,
        flow: Flow,
        *,
        divergence: Divergence | None = None,
        costs: Mapping[Cost, float | Callable[[float], float]] | None = None,
        tolerance: float | None = 1e-3,
        end_time_spread: float = 0.0,
        drop_context: float | None = None,
    ):
        super().__init__(flow)
        fields = [p.field for p in flow.modules() if isinstance(p, Continuous)]
        if any(event_dims(field) == 1 for field in fields):
            self.lr = 1e-2  # small smooth fields take larger steps than couplings do
        elif len(flow.event_shape) > 1 and not fields:
            self.lr = 2e-3  # couplings of many pixels diverge with more before they learn
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be positive or None, got {tolerance}")
        if not 0.0 <= end_time_spread < 1.0:
            raise ValueError(
                f"end_time_spread must lie in [0, 1), got {end_time_spread}: at 1 the flow could "
                "be asked to run for no time at all"
            )
        if not isinstance(costs or {}, Mapping) or not all(hasattr(c, "name") for c in costs or {}):
            raise TypeError(
                "costs maps records to their weights, as {KineticEnergy(): 0.01} does, got "
                f"{costs!r}"
            )
        for cost, weight in (costs or {}).items():
            if not callable(weight):
                _check_weight(cost, weight)
        self.divergence = divergence
        self.costs = dict(costs or {})
        self.tolerance = tolerance
        self.end_time_spread = end_time_spread
        self.drop_context = dropped_fraction(flow, drop_context)

    def forward(
        self, batch: Batch, *, generator: torch.Generator | None = None, progress: float = 0.0
    ) -> Loss:
        """The loss of one batch; ``terms`` holds ``"nll"`` and the mean of each cost, by name."""
        request = Request(
            divergence=self.divergence,
            tolerance=self.tolerance,
            costs=tuple(self.costs),
            generator=generator,
            clock=self._clock(generator),
        )
        context = batch.context
        if context is not None:
            context = without_context(context, self.drop_context, generator)
        found = self.flow.evaluate(batch.x, context, request)
        total = -mean(found.log_prob, batch.weight)
        terms = {"nll": total.detach()}
        for cost, weight in self.costs.items():
            if cost.name not in found.costs:  # a discrete flow has no path to integrate along
                continue
            average = mean(found.costs[cost.name], batch.weight)
            if callable(weight):
                weight = weight(progress)
                _check_weight(cost, weight)
            total = total + weight * average
            terms[cost.name] = average.detach()
        return Loss(total, terms)

    def _clock(self, generator: torch.Generator | None) -> float:
        if self.end_time_spread == 0.0:
            return 1.0
        device = "cpu" if generator is None else generator.device
        uniform = torch.rand((), generator=generator, device=device).item()
        return 1.0 + self.end_time_spread * (2.0 * uniform - 1.0)


def _check_weight(cost: Cost, weight: float) -> None:
    if not 0.0 <= weight < math.inf:
        raise ValueError(
            f"the weight of {cost.name} must be zero or positive, got {weight}: a negative one "
            "rewards what the cost measures, and training runs away"
        )
