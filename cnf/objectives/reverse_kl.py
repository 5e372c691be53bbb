"""Fitting a flow to an energy instead of to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.objectives.base import Batch, Loss, Objective
from cnf.transforms.base import Request

if TYPE_CHECKING:
    from cnf.divergence import Divergence
    from cnf.flow import Flow


class ReverseKL(Objective):
    """KL(q ‖ p) of the flow q from p ∝ exp(−energy), up to p's unknown log normaliser, in nats.

    ``total = E_q[log q(x) + energy(x)] = KL(q ‖ p) − log ∫ exp(−energy)``, by samples that carry
    the gradient (the reparameterisation trick). It needs no data: a batch only lends its context.
    Reverse KL favours modes: a flow may cover one of several and report a low loss.

    Args:
        flow: the flow to train.
        energy: from x, ``(*batch, *event)``, to minus the unnormalised log-density, ``(*batch,)``;
            of a conditional flow from x and the context. It must be differentiable in x.
        samples: draws per step; of a conditional flow, draws for each row of the context.
        divergence: the trace estimator for a continuous flow; None means the model's own.
        tolerance: rtol and atol of a continuous flow's solves while it is trained; None means the
            model's own.

    Paper: Rezende & Mohamed, "Variational inference with normalizing flows", ICML 2015.

    Example:
        >>> import cnf
        >>> objective = cnf.ReverseKL(cnf.realnvp(2), cnf.data.energy("ring"), samples=64)
        >>> sorted(objective().terms)
        ['energy', 'entropy', 'reverse kl']
    """

    def __init__(
        self,
        flow: Flow,
        energy: Callable[..., Tensor],
        *,
        samples: int = 256,
        divergence: Divergence | None = None,
        tolerance: float | None = 1e-3,
    ):
        super().__init__(flow)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.energy = energy
        self.samples = samples
        self.divergence = divergence
        self.tolerance = tolerance

    def forward(
        self,
        batch: Batch | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: float = 0.0,
    ) -> Loss:
        """The loss; ``terms`` holds ``"reverse kl"`` and its two parts, with total = their sum.

        Raises:
            ValueError: if the energy does not return one number per sample.
        """
        context = None if batch is None else batch.context
        request = Request(divergence=self.divergence, tolerance=self.tolerance, generator=generator)
        x, log_prob = self.flow.sample_and_log_prob((self.samples,), context, request=request)
        energy = self.energy(x) if context is None else self.energy(x, context)
        if energy.shape != log_prob.shape:
            raise ValueError(
                f"the energy must return one number per sample, {tuple(log_prob.shape)} for x of "
                f"shape {tuple(x.shape)}, and it returned {tuple(energy.shape)}"
            )
        total = (log_prob + energy).mean()
        parts = {"reverse kl": total, "energy": energy.mean(), "entropy": -log_prob.mean()}
        return Loss(total, {name: value.detach() for name, value in parts.items()})
