"""One optimiser step: the gradient, which may fail, and the move, which may not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnf.bijections import InversionError
from cnf.objectives import Batch, Objective
from cnf.ode import SolverError
from cnf.training.averaging import Average
from cnf.training.muon import Muon, suits

IN_A_ROW = 20  # failed steps in a row that end a run
WINDOW, IN_WINDOW = 100, 30  # or that many among the last so many

#: What a batch may raise without being anybody's mistake.
NUMERICAL = (SolverError, InversionError, torch.linalg.LinAlgError)


class Updater:
    """Gradient, clipping, optimiser and the average of the weights, for one objective.

    Args:
        objective: what to minimise.
        optimizer: one of ``OPTIMIZERS``.
        lr: the peak learning rate.
        weight_decay: decoupled; acts on matrices only, not on biases, scales or centres.
        clip: the largest norm of a gradient; longer ones are shortened. None for any.
        average: the decay of the moving average of the weights.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        optimizer: str,
        lr: float,
        weight_decay: float,
        clip: float | None,
        average: float,
    ):
        self.objective = objective
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "the flow has no parameter that requires a gradient, so there is nothing to fit"
            )
        self.lr = lr
        self.clip = clip
        self.optimizers = OPTIMIZERS[optimizer](self.parameters, lr, weight_decay)
        self.average = Average(self.parameters, average)

    def gradient(self, batch: Batch, generator: torch.Generator, progress: float) -> float:
        """Find the gradient, clipped, and return the loss; no weight changes.

        Args:
            batch: the rows.
            generator: where the objective's noise comes from.
            progress: the fraction of the budget that is spent.

        Raises:
            StepFailed: if loss or gradient is not finite or cannot be computed.
        """
        for parameter in self.parameters:
            parameter.grad = None
        try:
            loss = self.objective(batch, generator=generator, progress=progress)
            loss.total.backward()
        except NUMERICAL as error:
            raise StepFailed(type(error).__name__, str(error)) from error
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # one synchronisation with the device for both numbers
        total, length = torch.stack([loss.total.detach(), _norm(gradients, loss.total)]).tolist()
        if not math.isfinite(total):
            raise StepFailed("non-finite loss", f"the loss is {total}")
        if not math.isfinite(length):
            raise StepFailed("non-finite gradient", f"the gradient's norm is {length}")
        if self.clip is not None and length > self.clip:
            torch._foreach_mul_(gradients, self.clip / length)
        return total

    def step(self, rate: float) -> None:
        """Move weights and average along the gradient.

        Args:
            rate: the factor on the learning rate.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            optimizer.step()
        self.average.update()

    def healthy(self) -> bool:
        """Whether every weight is finite and no buffer holds a NaN."""
        tensors = [*self.parameters, *self.average.values]
        return all(bool(torch.isfinite(t).all()) for t in tensors) and not any(
            bool(torch.isnan(buffer).any()) for buffer in self.objective.buffers()
        )

    @torch.no_grad()
    def heal(self, good: dict[str, Tensor]) -> None:
        """Put buffers of the flow that a failed step has filled with NaN back to ``good``."""
        for name, buffer in self.objective.flow.named_buffers():
            if name in good and torch.isnan(buffer).any():
                buffer.copy_(good[name])


class StepFailed(ArithmeticError):  # noqa: N818
    """A step that could not be made; ``what`` names the kind, the message says more."""

    def __init__(self, what: str, message: str):
        super().__init__(message)
        self.what = what


class Failures:
    """When skipping steps is no longer worth it.

    >>> failures = Failures()
    >>> [failures.persist(True) for _ in range(20)][-2:]
    [False, True]
    """

    def __init__(self) -> None:
        self._row = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def persist(self, failed: bool) -> bool:
        """Take note of a step; True if too many of the latest have failed."""
        self._row = self._row + 1 if failed else 0
        self._recent.append(failed)
        return self._row >= IN_A_ROW or sum(self._recent) > IN_WINDOW


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters."""
    groups = [{"params": list(parameters), "weight_decay": 0.0}]
    if decay:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=fused)]


def muon(
    parameters: Sequence[nn.Parameter], lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of wide layers, AdamW for the rest."""
    wide = [p for p in parameters if suits(p)]
    rest = [p for p in parameters if not suits(p)]
    found: list[torch.optim.Optimizer] = adamw(rest, lr, decay) if rest else []
    return [*found, Muon(wide, lr=lr, weight_decay=decay)] if wide else found


#: What takes the steps, by the name that ``fit(optimizer=…)`` takes.
OPTIMIZERS: dict[
    str, Callable[[Sequence[nn.Parameter], float, float], list[torch.optim.Optimizer]]
] = {"adamw": adamw, "muon": muon}


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    """The Euclidean norm of all gradients together, in the loss's dtype."""
    if not gradients:
        return torch.zeros_like(like.detach())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.to(like.dtype) for norm in norms]))
