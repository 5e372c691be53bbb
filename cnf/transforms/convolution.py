"""Invertible 1×1 convolutions: a linear map of the channels at every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf.transforms.base import Mapped, Request, Transform
from cnf.transforms.linear import Linear, LULinear


class Convolution1x1(Transform):
    """Any ``Linear`` over the channels of ``(*batch, channels, height, width)``.

    log_det = height · width · log |det W| in nats. From Kingma & Dhariwal, "Glow" (2018).

    Args:
        linear: the map of one pixel's channels.

    Example:
        >>> import torch
        >>> from cnf.transforms import LULinear
        >>> convolution = Convolution1x1(LULinear.from_matrix(torch.tensor([2.0, 0.5, 0.8]).diag()))
        >>> round(convolution(torch.zeros(3, 32, 32)).log_det.item(), 1)
        -228.5
    """

    def __init__(self, linear: Linear):
        super().__init__()
        self.linear = linear

    @classmethod
    def random(cls, channels: int, generator: torch.Generator | None = None) -> Convolution1x1:
        """Start at a random rotation, LU-parametrised and without bias, as Glow does."""
        Q, R = torch.linalg.qr(torch.randn(channels, channels, generator=generator))
        # the signs of R's diagonal make Q uniform over the orthogonal matrices
        return cls(LULinear.from_matrix(Q * R.diagonal().sign(), bias=False))

    def forward(
        self, z: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map z to x pixel by pixel."""
        return self._pixelwise(self.linear.forward(self._channels_last(z), context, request))

    def inverse(
        self, x: Tensor, context: Tensor | None = None, request: Request | None = None
    ) -> Mapped:
        """Map x to z pixel by pixel."""
        return self._pixelwise(self.linear.inverse(self._channels_last(x), context, request))

    def _channels_last(self, value: Tensor) -> Tensor:
        if value.ndim < 3 or value.shape[-3] != self.linear.features:
            raise ValueError(
                f"expected (*batch, {self.linear.features}, height, width), "
                f"got {tuple(value.shape)}"
            )
        return value.movedim(-3, -1)

    @staticmethod
    def _pixelwise(mapped: Mapped) -> Mapped:
        value, log_det, costs = mapped
        return Mapped(value.movedim(-1, -3), log_det.sum((-2, -1)), costs)
