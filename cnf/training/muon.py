"""Muon: momentum whose singular values are levelled, for the weight matrices of layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEAST = 8  # rows and columns: narrower matrices have few directions to level
ITERATIONS = 5
# of Newton and Schulz's iteration, chosen by Jordan for a steep start: it ends between 0.7 and 1.2
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Steps of equal size in all directions of a matrix, ``W ← W − lr √max(1, m/n) U Vᵀ``.

    ``U S Vᵀ`` is the momentum of the gradient, ``(m, n)``. Where AdamW scales entry by entry, this
    moves along rare directions as far as along those that all rows of a batch agree on.
    ``torch.optim.Muon`` takes matrices one by one and in bfloat16; here those of one shape go
    together and in their own precision, which for the small networks of a velocity is several
    times as fast.

    Args:
        parameters: matrices.
        lr: the size of a step.
        weight_decay: decoupled, as AdamW's.
        momentum: of the gradient, in the manner of Nesterov.

    Paper: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024;
    Bernstein and Newhouse, "Old optimizer, new norm", 2024 (arXiv:2409.20325).

    Example:
        >>> weight = nn.Parameter(torch.zeros(8, 8))
        >>> weight.grad = torch.diag(torch.arange(1.0, 9.0))
        >>> Muon([weight], lr=0.1).step()
        >>> bool((weight.diagonal() < -0.05).all())  # whatever the size of the gradient's entries
        True
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])
                alike.setdefault(parameter.shape, []).append((parameter, ahead))
            for shape, moved in alike.items():
                levelled = level(torch.stack([ahead for _, ahead in moved]))
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (parameter, _), direction in zip(moved, levelled, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-size)


def level(matrices: Tensor) -> Tensor:
    """``U Vᵀ`` of each ``U S Vᵀ`` up to factors between 0.7 and 1.2, ``(k, m, n)``.

    Args:
        matrices: ``(k, m, n)``.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ITERATIONS):
        square = torch.bmm(x, x.mT)
        square = torch.baddbmm(square, square, square, beta=CUBIC, alpha=QUINTIC)
        x = torch.baddbmm(x, square, x, beta=LINEAR)
    return x if wide else x.mT


def suits(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix that is wide enough in both directions."""
    return parameter.ndim == 2 and min(parameter.shape) >= LEAST
