"""zuko's continuous flow: its solver around the reference's net, and the flow as it ships."""

from __future__ import annotations

import math

import torch
import zuko
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


def shipped(features: int, x: Tensor, steps: int = 500) -> zuko.flows.CNF:
    """zuko's own CNF with three layers of 64, trained by flow matching to have somewhere to go."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        flow = zuko.flows.CNF(features, hidden_features=(64, 64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (256,), generator=generator)]
        z = torch.randn(rows.shape, generator=generator)
        t = torch.rand(len(rows), generator=generator)
        # zuko's time runs from data to base
        place = torch.lerp(rows, z, t.unsqueeze(-1))
        loss = (flow.transform.f(t, place) - (z - rows)).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.eval()


def tolerate(flow: zuko.flows.CNF, tolerance: float) -> zuko.flows.CNF:
    """The flow at another tolerance, in place."""
    flow.transform.atol = flow.transform.rtol = tolerance
    return flow
