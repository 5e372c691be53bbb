"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """A running average of parameters, ``a ← d·a + (1 − d)·p``.

    At update n, ``d = min(decay, (1 + n) / (10 + n))``, which keeps the horizon below a tenth of
    the updates made so far: a short run is not held back by its first weights.

    Args:
        parameters: what to average; they are followed, not copied.
        decay: the final d; 0 means that the average is the latest value.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> average = Average([weight], decay=0.0)
        >>> _ = weight.data.fill_(3.0)
        >>> average.update()
        >>> average.values
        [tensor([3.])]
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"average must lie in [0, 1), got {decay}; 0 turns averaging off")
        self.parameters: list[Tensor] = list(parameters)
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards what they held before."""
        with torch.no_grad():
            raw = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.values)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, raw)
