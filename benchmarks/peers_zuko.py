"""zuko's continuous flow around the reference's net, whose numbers others have too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from zuko.transforms import FreeFormJacobianTransform

from benchmarks.reference import Net


class ZukoSolver(nn.Module):
    """zuko's transform and gradient around a net that others have too.

    Args:
        net: the velocity.
        tolerance: rtol and atol.
    """

    def __init__(self, net: Net, tolerance: float = 1e-5):
        super().__init__()
        self.net, self.tolerance = net, tolerance

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density with an exact trace."""
        z, change = self._transform(1.0, 0.0).call_and_ladj(x)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1) + change

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The data of latent z."""
        return self._transform(0.0, 1.0)(z)

    def _transform(self, start: float, end: float) -> FreeFormJacobianTransform:
        phi = tuple(self.net.parameters()) if torch.is_grad_enabled() else ()
        tolerance = self.tolerance
        return FreeFormJacobianTransform(
            self.net, start, end, phi=phi, atol=tolerance, rtol=tolerance
        )
