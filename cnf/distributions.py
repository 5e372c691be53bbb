"""Base distributions: what a flow starts from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Base(nn.Module, ABC):
    """A distribution over latent variables ``z`` of shape ``event_shape``."""

    event_shape: tuple[int, ...]

    @abstractmethod
    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, ``(*batch,)`` for z of ``(*batch, *event_shape)``."""

    @abstractmethod
    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*shape, *event_shape)``, differentiable where the parameters are.

        Args:
            shape: the batch shape of the draw; the context's batch shape where there is one.
            context: ``(*shape, context_features)``.
            temperature: multiplies the spread around the centre; 1 samples the distribution.
            generator: where the randomness comes from.
        """

    def event_sum(self, values: Tensor) -> Tensor:
        """Sum over the event's axes."""
        return values.flatten(values.dim() - len(self.event_shape)).sum(-1)


class Normal(Base):
    """Independent normal variables, N(loc, scale²) each; the standard normal unless trained.

    log p(z) = -½ Σ ((z - loc) / scale)² - Σ log scale - D/2 log 2π

    Args:
        event_shape: the shape of one z; an int stands for a vector.
        trainable: learn ``loc`` and ``scale``.

    Example:
        >>> import torch
        >>> Normal(2).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def __init__(self, event_shape: int | Sequence[int], *, trainable: bool = False):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        loc, log_scale = torch.zeros(self.event_shape), torch.zeros(self.event_shape)
        self.trainable = trainable
        if trainable:
            self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(log_scale)
        else:
            self.register_buffer("loc", loc)
            self.register_buffer("log_scale", log_scale)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats."""
        normal = math.log(2 * math.pi) * math.prod(self.event_shape)
        if not self.trainable:
            return -0.5 * (self.event_sum(z.square()) + normal)
        squares = ((z - self.loc) * torch.exp(-self.log_scale)).square()
        return -0.5 * (self.event_sum(squares) + normal) - self.log_scale.sum()

    def rsample(
        self,
        shape: Sequence[int],
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw by reparameterisation."""
        noise = torch.randn(
            (*shape, *self.event_shape),
            dtype=self.loc.dtype,
            device=self.loc.device,
            generator=generator,
        )
        return self.loc + temperature * torch.exp(self.log_scale) * noise

    def extra_repr(self) -> str:
        """What distinguishes this base."""
        return f"{self.event_shape}, trainable={self.trainable}"


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """An event shape from an int or a sequence of them.

    >>> as_shape(3)
    (3,)
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"an event shape is positive integers, got {shape!r}")
    return sizes
