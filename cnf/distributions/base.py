"""The contract of base distributions."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cnf.transforms.base import Request


class Base(nn.Module, ABC):
    """A distribution over latent variables ``z`` of shape ``event_shape``.

    Many bases take a ``conditioner``: a module from the context ``(*batch, context_features)`` to
    as many numbers per sample as the base's ``outputs`` says. They are added to the base's own raw
    parameters, so a conditioner whose last layer starts at zero changes nothing at first.
    """

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

    def initialize(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> None:
        """Set data-dependent parameters from a batch of latent points; most bases have none."""

    def event_sum(self, values: Tensor) -> Tensor:
        """Sum over the event's axes."""
        return values.flatten(values.dim() - len(self.event_shape)).sum(-1)


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """An event shape from an int or a sequence of them.

    >>> as_shape(3)
    (3,)
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"an event shape is positive integers, got {shape!r}")
    return sizes


def sample_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """How many samples to draw, as a checked shape.

    >>> sample_sizes([5, 2])
    (5, 2)
    """
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise ValueError(
            "how many samples to draw is a tuple of sizes, as in flow.sample((1000,)), got "
            f"{shape!r}"
        )
    return sizes


def conditioned(
    own: Sequence[Tensor], conditioner: nn.Module | None, context: Tensor | None
) -> list[Tensor]:
    """A module's raw parameters, moved by what the conditioner makes of the context.

    Returns:
        Tensors of the parameters' shapes, with the context's batch axes before them where there is
        a conditioner.
    """
    if conditioner is None:
        return list(own)
    if context is None:
        raise ValueError("these parameters depend on a context: pass context=")
    shifts = conditioner(context)
    sizes = [parameter.numel() for parameter in own]
    if shifts.shape[-1] != sum(sizes):
        raise ValueError(
            f"the conditioner must return {sum(sizes)} numbers per sample, it "
            f"returned {shifts.shape[-1]}"
        )
    parts = zip(own, shifts.split(sizes, -1), strict=True)
    return [p + shift.reshape((*shift.shape[:-1], *p.shape)) for p, shift in parts]


def keep(module: nn.Module, trainable: bool, **tensors: Tensor) -> None:
    """Register tensors on a module, as parameters or as buffers."""
    for name, tensor in tensors.items():
        if trainable:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers strictly between 0 and 1, in the dtype and on the device of ``like``.

    >>> uniform((2, 3), torch.zeros(1)).shape
    torch.Size([2, 3])
    """
    drawn = torch.rand(tuple(shape), dtype=like.dtype, device=like.device, generator=generator)
    return drawn.clamp_min(torch.finfo(like.dtype).tiny)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, in the dtype and on the device of ``like``."""
    return torch.randn(tuple(shape), dtype=like.dtype, device=like.device, generator=generator)
