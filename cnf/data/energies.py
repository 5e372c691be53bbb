"""Two-dimensional energies to fit flows to without data, each with its normaliser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cnf.registry import unknown_name

Bounds = tuple[tuple[float, float], tuple[float, float]]

_WALL = 4.0  # the paper shows its potentials on [-4, 4]², and three of them never end
_SOFT = 0.4  # the standard deviation of the wall
_ROOT = math.sqrt(2 * math.pi)
# ∫ exp(-wall) over the first coordinate
_ROOM = 2 * _WALL + _ROOT * _SOFT


@dataclasses.dataclass(frozen=True)
class Energy:
    """Minus an unnormalised log-density in the plane, −log p(x) − log Z, in nats.

    Attributes:
        name: what ``cnf.data.energy`` calls it.
        function: from ``(*batch, 2)`` to ``(*batch,)``.
        log_normalizer: log Z = log ∫ exp(−energy(x)) dx.
        bounds: limits for pictures, ``((x_low, x_high), (y_low, y_high))``.

    Example:
        >>> import torch
        >>> gaussian = energy("gaussian")
        >>> gaussian(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    name: str
    function: Callable[[Tensor], Tensor] = dataclasses.field(repr=False)
    log_normalizer: float
    bounds: Bounds = ((-4.0, 4.0), (-4.0, 4.0))

    def __call__(self, x: Tensor) -> Tensor:
        """The energy at ``(*batch, 2)``.

        Raises:
            ValueError: if the last axis of ``x`` is not 2.
        """
        if x.shape[-1:] != (2,):
            raise ValueError(
                f"{self.name} is an energy on the plane: expected x of shape (*batch, 2), got "
                f"{tuple(x.shape)}"
            )
        return self.function(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """The normalised log-density in nats, ``(*batch,)``."""
        return -self(x) - self.log_normalizer


def energies() -> tuple[str, ...]:
    """The names that ``energy`` knows.

    Example:
        >>> energies()
        ('ring', 'wave', 'split', 'step', 'gaussian', 'banana', 'funnel')
    """
    return tuple(_ENERGIES)


def energy(name: str) -> Energy:
    """The 2-D energy of that name.

    ``ring``, ``wave``, ``split`` and ``step`` are the four potentials of Rezende & Mohamed
    ("Variational inference with normalizing flows", ICML 2015, table 1). The last three go on for
    ever along the first coordinate u; with ½ (max(|u| − 4, 0) / 0.4)² added they have a normaliser.
    ``gaussian``, ``banana`` and ``funnel`` (Neal 2003) are transformed Gaussians.

    Args:
        name: one of ``energies()``.

    Raises:
        UnknownNameError: if there is no such energy; the message names the nearest.

    Example:
        >>> import torch
        >>> round(energy("gaussian").log_prob(torch.zeros(2)).item(), 4)
        -1.8379
    """
    if name not in _ENERGIES:
        raise unknown_name("energy", name, _ENERGIES)
    return _ENERGIES[name]


def _half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square()


def _wall(u: Tensor) -> Tensor:
    return _half_square((u.abs() - _WALL).clamp(min=0) / _SOFT)


def _crest(u: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * u)


def _either(first: Tensor, second: Tensor) -> Tensor:
    """−log(exp(−first) + exp(−second))."""
    return -torch.logaddexp(-first, -second)


def _ring(x: Tensor) -> Tensor:
    u = x[..., 0]
    radius = torch.linalg.vector_norm(x, dim=-1)
    return _half_square((radius - 2) / 0.4) + _either(
        _half_square((u - 2) / 0.6), _half_square((u + 2) / 0.6)
    )


def _wave(x: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return _half_square((v - _crest(u)) / 0.4) + _wall(u)


def _split(x: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    bump = 3 * torch.exp(-_half_square((u - 1) / 0.6))
    above = v - _crest(u)
    return _either(_half_square(above / 0.35), _half_square((above + bump) / 0.35)) + _wall(u)


def _step(x: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    above = v - _crest(u)
    lower = above + 3 * torch.sigmoid((u - 1) / 0.3)
    return _either(_half_square(above / 0.4), _half_square(lower / 0.35)) + _wall(u)


def _gaussian(x: Tensor) -> Tensor:
    """Unit variances, correlation zero after a shear of determinant 1."""
    u, v = x.unbind(-1)
    return _half_square(u) + _half_square(v - 0.8 * u)


def _banana(x: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return _half_square(u / 1.5) + _half_square((v - 0.5 * u.square() + 1) / 0.5)


def _funnel(x: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return _half_square(u / 1.5) + _half_square(v * torch.exp(-0.5 * u)) + 0.5 * u


_ENERGIES: dict[str, Energy] = {
    one.name: one
    for one in (
        # by quadrature on a grid of spacing 0.005
        Energy("ring", _ring, 1.8775016),
        # for every u the Gaussians in v have the mass that they have without waves and bumps
        Energy("wave", _wave, math.log(_ROOT * 0.4 * _ROOM)),
        Energy("split", _split, math.log(_ROOT * 0.7 * _ROOM)),
        Energy("step", _step, math.log(_ROOT * 0.75 * _ROOM)),
        Energy("gaussian", _gaussian, math.log(2 * math.pi)),
        Energy("banana", _banana, math.log(2 * math.pi * 1.5 * 0.5), ((-5.0, 5.0), (-3.0, 7.0))),
        Energy("funnel", _funnel, math.log(2 * math.pi * 1.5), ((-6.0, 6.0), (-8.0, 8.0))),
    )
}
