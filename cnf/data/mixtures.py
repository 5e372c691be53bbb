"""Targets with a closed-form density: Gaussian mixtures, blurred circles, a checkerboard."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cnf.data.targets import Noise, Target


def log_isotropic_mixture(x: Tensor, centres: Tensor, log_weights: Tensor, sigma: float) -> Tensor:
    """Log-density of Σᵢ wᵢ N(x; cᵢ, σ² I) in the plane, ``(n,)``.

    The square is expanded so that the work is one matrix product.

    Args:
        x: points, ``(n, 2)``.
        centres: ``(k, 2)``.
        log_weights: ``(k,)``.
        sigma: the standard deviation of every component.
    """
    scaled = centres / sigma**2
    offsets = log_weights - 0.5 * (centres * scaled).sum(-1)
    exponents = torch.addmm(offsets, x, scaled.mT)
    norm = 0.5 * x.square().sum(-1) / sigma**2 + math.log(2 * math.pi * sigma**2)
    return torch.logsumexp(exponents, -1) - norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussians(Target):
    """An equal mixture of Gaussians of one standard deviation.

    Attributes:
        centres: their means.
        sigma: their standard deviation.
    """

    centres: tuple[tuple[float, float], ...]
    sigma: float

    def _draw(self, n: int, noise: Noise) -> Tensor:
        which = noise.choice(len(self.centres), n)
        centres = torch.tensor(self.centres, dtype=torch.float64, device=which.device)
        return centres[which] + self.sigma * noise.normal(n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        centres = x.new_tensor(self.centres)
        log_weights = x.new_full((len(centres),), -math.log(len(centres)))
        return log_isotropic_mixture(x, centres, log_weights, self.sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circles(Target):
    """An equal mixture of circles around the origin, blurred by Gaussian noise.

    A circle of radius R blurred by σ has density N₂(r - R; σ²) I₀ᵉ(r R / σ²), r = ‖x‖, with I₀ᵉ
    the exponentially scaled Bessel function.

    Attributes:
        radii: of the circles.
        sigma: standard deviation of the noise.
    """

    radii: tuple[float, ...]
    sigma: float

    def _draw(self, n: int, noise: Noise) -> Tensor:
        which = noise.choice(len(self.radii), n)
        radii = torch.tensor(self.radii, dtype=torch.float64, device=which.device)[which]
        angles = 2 * math.pi * noise.uniform(n)
        points = radii[:, None] * torch.stack((angles.cos(), angles.sin()), -1)
        return points + self.sigma * noise.normal(n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        radii = x.new_tensor(self.radii)
        bessel = torch.special.i0e(radius * radii / self.sigma**2)
        exponents = bessel.log() - 0.5 * ((radius - radii) / self.sigma).square()
        norm = math.log(2 * math.pi * self.sigma**2 * len(self.radii))
        return torch.logsumexp(exponents, -1) - norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkerboard(Target):
    """Uniform on every other square of a board around the origin.

    A square belongs to the support when its column and its row, counted from the lower left, are
    both even or both odd; squares are half-open.

    Attributes:
        squares: along each side of the board, an even number.
        side: length of a square's side.
    """

    squares: int
    side: float

    def _draw(self, n: int, noise: Noise) -> Tensor:
        column = noise.choice(self.squares, n)
        row = 2 * noise.choice(self.squares // 2, n) + column % 2
        corner = torch.stack((column, row), -1) - self.squares // 2
        return self.side * (corner + noise.uniform(n, 2))

    def _log_density(self, x: Tensor) -> Tensor:
        cell = torch.floor(x / self.side) + self.squares // 2
        on_board = ((cell >= 0) & (cell < self.squares)).all(-1)
        coloured = torch.remainder(cell.sum(-1), 2) == 0
        area = 0.5 * (self.squares * self.side) ** 2
        return torch.where(on_board & coloured, x.new_tensor(-math.log(area)), -torch.inf)
