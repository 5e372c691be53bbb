"""Targets that are curves blurred by noise; their density is a one-dimensional quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cnf.data.mixtures import log_isotropic_mixture
from cnf.data.targets import Noise, Target


@functools.cache
def _gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], float64 on the CPU."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(0.5 * (places + 1)), torch.from_numpy(0.5 * weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlurredCurves(Target):
    """An equal mixture of curves c(u), u uniform on [0, 1], blurred by Gaussian noise.

    The density ∫ N(x; c(u), σ² I) du is one Gauss-Legendre rule over each whole curve: its nodes
    crowd at the ends of the curve, where the integrand is steepest for far points.

    Attributes:
        curves: functions that map u, ``(n,)``, to points, ``(n, 2)``.
        sigma: standard deviation of the noise.
        nodes: of the quadrature of each curve.
    """

    curves: tuple[Callable[[Tensor], Tensor], ...]
    sigma: float
    nodes: int

    @property
    def _width(self) -> int:
        return self.nodes * len(self.curves)

    def _draw(self, n: int, noise: Noise) -> Tensor:
        which = noise.choice(len(self.curves), n)
        places = noise.uniform(n)
        points = torch.stack([curve(places) for curve in self.curves])
        chosen = points[which, torch.arange(n, device=which.device)]
        return chosen + self.sigma * noise.normal(n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        places, weights = (part.to(x.device) for part in _gauss_legendre(self.nodes))
        centres = torch.cat([curve(places) for curve in self.curves])
        log_weights = (weights / len(self.curves)).log().repeat(len(self.curves))
        return log_isotropic_mixture(x, centres, log_weights, self.sigma)


def outer_moon(u: Tensor) -> Tensor:
    """The upper half circle of scikit-learn's moons, scaled by 2 and shifted by (-1, -0.2)."""
    angle = math.pi * u
    return torch.stack((2 * angle.cos() - 1, 2 * angle.sin() - 0.2), -1)


def inner_moon(u: Tensor) -> Tensor:
    """The lower half circle (1 - cos t, 1/2 - sin t), scaled by 2 and shifted by (-1, -0.2)."""
    angle = math.pi * u
    return torch.stack((1 - 2 * angle.cos(), 0.8 - 2 * angle.sin()), -1)


def roll(u: Tensor) -> Tensor:
    """The spiral of scikit-learn's Swiss roll, t = 1.5 π (1 + 2 u), divided by 5."""
    t = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack((t * t.cos(), t * t.sin()), -1) / 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoSpirals(Target):
    """A spiral and its mirror image through the origin, blurred by a box and by a Gaussian.

    With n = 3π √U: x = ±((-n cos n, n sin n) + (U₁, U₂) / 2) / 3 + σ N(0, I), all U uniform on
    [0, 1]. Given n the density is a product of two differences of normal distribution functions;
    a Gauss-Legendre rule over n (whose density is 2 n / (3π)²) does the rest.

    Attributes:
        sigma: standard deviation of the Gaussian noise.
        nodes: of the quadrature.
    """

    sigma: float
    nodes: int

    # Within this radius no density underflows, so it can be summed without logarithms.
    _NEAR = 5.0
    _TURN = 3 * math.pi
    _HALF_BOX = 0.5 / 3 / 2

    @property
    def _width(self) -> int:
        return 2 * self.nodes

    def _spiral(self, n: Tensor) -> Tensor:
        """The corner of the box at n, ``(*n, 2)``."""
        return torch.stack((-n * n.cos(), n * n.sin()), -1) / 3

    def _draw(self, n: int, noise: Noise) -> Tensor:
        mirror = 1 - 2 * noise.choice(2, n)
        along = self._TURN * noise.uniform(n).sqrt()
        points = self._spiral(along) + 2 * self._HALF_BOX * noise.uniform(n, 2)
        return mirror[:, None] * points + self.sigma * noise.normal(n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        near = torch.linalg.vector_norm(x.detach(), dim=-1) < self._NEAR
        if near.all():
            return self._near(x)
        value = torch.zeros_like(x[:, 0])
        value = value.index_put((near,), self._near(x[near]))
        return value.index_put((~near,), self._far(x[~near]))

    def _rule(self, x: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Centres of the boxes of both spirals, ``(2 nodes, 2)``, and their weights."""
        places, weights = (part.to(x.device) for part in _gauss_legendre(nodes))
        centres = self._spiral(self._TURN * places) + self._HALF_BOX
        return torch.cat((centres, -centres)), (weights * places).repeat(2)

    def _near(self, x: Tensor) -> Tensor:
        centres, weights = self._rule(x, self.nodes)
        scale = 1 / (math.sqrt(2) * self.sigma)
        total = weights
        for axis in range(2):
            # The distance, so that erfc never cancels: box * Gaussian is even.
            distance = (x[:, axis, None] - centres[:, axis]).abs() * scale
            half = self._HALF_BOX * scale
            total = total * (torch.erfc(distance - half) - torch.erfc(distance + half))
        return total.sum(-1).log() - 2 * math.log(4 * self._HALF_BOX)

    def _far(self, x: Tensor) -> Tensor:
        # The integrand sharpens with the distance; far points are few and can afford more nodes.
        centres, weights = self._rule(x, 3 * self.nodes)
        total = weights.log()
        for axis in range(2):
            distance = (x[:, axis, None] - centres[:, axis]).abs()
            upper = torch.special.log_ndtr((self._HALF_BOX - distance) / self.sigma)
            lower = torch.special.log_ndtr((-self._HALF_BOX - distance) / self.sigma)
            total = total + upper + torch.log1p(-(lower - upper).exp())
        return torch.logsumexp(total, -1) - 2 * math.log(2 * self._HALF_BOX)
