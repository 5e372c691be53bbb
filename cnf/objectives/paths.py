"""Probability paths from base to data, and where along them to look."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cnf.registry import unknown_name


class PathPoint(NamedTuple):
    """Where a path is at given times, x_t = base · z + data · x, and how fast it moves.

    Attributes:
        base: the weight of z.
        data: the weight of x.
        base_rate: its derivative in t.
        data_rate: its derivative in t.
    """

    base: Tensor
    data: Tensor
    base_rate: Tensor
    data_rate: Tensor

    def position(self, z: Tensor, x: Tensor) -> Tensor:
        """x_t of pairs ``(rows, *event)``."""
        return _along(self.base, z) + _along(self.data, x)

    def velocity(self, z: Tensor, x: Tensor) -> Tensor:
        """dx_t/dt of pairs ``(rows, *event)``."""
        return _along(self.base_rate, z) + _along(self.data_rate, x)


class Path(ABC):
    """A family of curves from z (t = 0) to x (t = 1). Subclasses are frozen records.

    Attributes:
        times: the name of the distribution of times that it is matched with by default.
    """

    times: ClassVar[str] = "uniform"

    @abstractmethod
    def at(self, t: Tensor) -> PathPoint:
        """The path at times t in [0, 1], ``(rows,)``."""


@dataclasses.dataclass(frozen=True)
class LinearPath(Path):
    """x_t = (1 − (1 − σ_min) t) z + t x.

    Attributes:
        sigma_min: the spread that is left around each data point at t = 1.

    Paper: Lipman et al., "Flow matching for generative modeling", ICLR 2023 (its optimal-transport
    path); Liu et al., "Flow straight and fast", ICLR 2023, with ``sigma_min`` 0.

    Example:
        >>> LinearPath().at(torch.tensor([0.25])).position(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[0.2500]])
    """

    times: ClassVar[str] = "late"
    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    def at(self, t: Tensor) -> PathPoint:
        """Straight lines at constant speed."""
        one, slope = torch.ones_like(t), 1 - self.sigma_min
        return PathPoint(1 - slope * t, t, -slope * one, one)


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Path):
    """x_t = √(1 − α²) z + α x with α = exp(−½ ∫₀ˢ β), β linear in s = 1 − t.

    The diffusion path run backwards, so that t = 0 is (all but) the base. Close to t = 1 its
    velocity grows without bound; ``least`` keeps s away from 0.

    Attributes:
        beta_min: β at the data.
        beta_max: β at the base.
        least: the smallest s.

    Paper: Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020; Song et al.,
    "Score-based generative modeling through SDEs", ICLR 2021; as a path, Lipman et al., ICLR 2023.

    Example:
        >>> point = VariancePreserving().at(torch.tensor([0.5]))
        >>> round((point.base**2 + point.data**2).item(), 5)
        1.0
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    least: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"expected 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}"
            )
        if not 0 < self.least < 1:
            raise ValueError(f"least must lie between 0 and 1, got {self.least}")

    def at(self, t: Tensor) -> PathPoint:
        """Noise and data in proportions whose squares sum to one."""
        s = (1 - t).clamp(min=self.least)
        rise = self.beta_max - self.beta_min
        integral, beta = s * (self.beta_min + 0.5 * rise * s), self.beta_min + rise * s
        data, base = torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))
        rate = 0.5 * beta * data
        return PathPoint(base, data, -rate * data / base, rate)


class Times(ABC):
    """A distribution of times on [0, 1]. Subclasses are frozen records."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a fraction u of the times lies."""

    def draw(self, n: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw n times, one from each of n equally likely intervals, in random order.

        Each has the distribution; together they cover it more evenly than independent ones do.
        """
        place = torch.randperm(n, generator=generator, device=like.device)
        within = torch.rand(n, generator=generator, dtype=like.dtype, device=like.device)
        return self.quantile((place + within) / max(n, 1))


@dataclasses.dataclass(frozen=True)
class UniformTimes(Times):
    """Every time alike."""

    def quantile(self, u: Tensor) -> Tensor:
        """U itself."""
        return u


@dataclasses.dataclass(frozen=True)
class LateTimes(Times):
    """t = 1 − (1 − u)ᵖ with u uniform: more often close to the data, where errors cost most nats.

    On a linear path the score is s = (t v − x) / (1 − t), and KL(p ‖ q) = ∫ E[δvᵀ δs] dt: an error
    δv of the velocity costs t / (1 − t) times its square where the score errs with it.

    Attributes:
        power: p; 1 makes every time alike.

    Paper: for the integral, Albergo et al., "Stochastic interpolants", 2023 (arXiv:2303.08797).

    Example:
        >>> LateTimes().quantile(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.7500, 1.0000])
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def quantile(self, u: Tensor) -> Tensor:
        """One minus a power of what is left."""
        return 1 - (1 - u) ** self.power


@dataclasses.dataclass(frozen=True)
class LogitNormalTimes(Times):
    """t = σ(mean + scale · N(0, 1)): more often in the middle, where the velocity is hardest.

    Attributes:
        mean: of the logit.
        scale: its standard deviation.

    Paper: Esser et al., "Scaling rectified flow transformers", ICML 2024.
    """

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """The logistic function of the normal quantile."""
        return torch.sigmoid(self.mean + self.scale * torch.special.ndtri(u))


PATHS: dict[str, type[Path]] = {"linear": LinearPath, "vp": VariancePreserving}
TIMES: dict[str, type[Times]] = {
    "uniform": UniformTimes,
    "late": LateTimes,
    "logit-normal": LogitNormalTimes,
}


def as_path(path: str | Path) -> Path:
    """A path by its name, or the path itself."""
    if isinstance(path, Path):
        return path
    if path not in PATHS:
        raise unknown_name("path", path, PATHS)
    return PATHS[path]()


def as_times(times: str | Times) -> Times:
    """A distribution of times by its name, or the distribution itself."""
    if isinstance(times, Times):
        return times
    if times not in TIMES:
        raise unknown_name("distribution of times", times, TIMES)
    return TIMES[times]()


def _along(weight: Tensor, rows: Tensor) -> Tensor:
    """One weight per row, times the rows."""
    return weight.reshape(-1, *[1] * (rows.dim() - 1)) * rows
