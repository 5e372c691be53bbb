"""Networks of angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Periodic(nn.Module):
    """A network of cosine and sine of its inputs, so that it has their period.

    Args:
        net: takes ``(*batch, 2 · inputs)`` and a context.
        period: of every input.

    Example:
        >>> import torch
        >>> from cnf.nets import MLP
        >>> net = Periodic(MLP(2, 3, zero_last=False), period=1.0)
        >>> torch.allclose(net(torch.tensor([0.25])), net(torch.tensor([3.25])), atol=1e-5)
        True
    """

    def __init__(self, net: nn.Module, period: float = 2 * math.pi):
        super().__init__()
        if not period > 0:
            raise ValueError(f"a period is positive, got {period}")
        self.net = net
        self.period = period

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The net of cos and sin of x ``(*batch, inputs)``."""
        angle = x * (2 * math.pi / self.period)
        return self.net(torch.cat([torch.cos(angle), torch.sin(angle)], -1), context)

    def extra_repr(self) -> str:
        """The period."""
        return f"period={self.period:g}"
