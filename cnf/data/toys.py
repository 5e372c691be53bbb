"""The eight 2-D densities of FFJORD, by name."""

from __future__ import annotations

import math

from cnf.data.curves import BlurredCurves, TwoSpirals, inner_moon, outer_moon, roll
from cnf.data.mixtures import Checkerboard, Circles, Gaussians
from cnf.data.pinwheel import Pinwheel
from cnf.data.targets import Target
from cnf.registry import unknown_name

# FFJORD divides its ring of Gaussians by this rounded √2.
_ROOT_TWO = 1.414
# The entropies come from the quadratures in tests/data/test_toy.py, run at half the spacing and
# less until nine decimals stood still.
_QUADRATURE = 1e-9

_TOYS: dict[str, Target] = {
    target.name: target
    for target in (
        Gaussians(
            name="8gaussians",
            entropy=2.8318804061,
            entropy_stderr=_QUADRATURE,
            centres=tuple(
                (
                    4 / _ROOT_TWO * math.cos(math.pi * k / 4),
                    4 / _ROOT_TWO * math.sin(math.pi * k / 4),
                )
                for k in range(8)
            ),
            sigma=0.5 / _ROOT_TWO,
        ),
        Pinwheel(name="pinwheel", entropy=2.3177880358, entropy_stderr=_QUADRATURE),
        Checkerboard(
            name="checkerboard",
            entropy=math.log(32.0),
            bounds=((-4.5, 4.5), (-4.5, 4.5)),
            squares=4,
            side=2.0,
        ),
        Circles(
            name="rings",
            entropy=2.6231827703,
            entropy_stderr=_QUADRATURE,
            radii=(0.75, 1.5, 2.25, 3.0),
            sigma=0.08,
        ),
        Circles(
            name="circles",
            entropy=3.2681357117,
            entropy_stderr=_QUADRATURE,
            radii=(1.5, 3.0),
            sigma=0.24,
        ),
        BlurredCurves(
            name="moons",
            entropy=2.3938791960,
            entropy_stderr=_QUADRATURE,
            curves=(outer_moon, inner_moon),
            sigma=0.2,
            nodes=192,
        ),
        BlurredCurves(
            name="swissroll",
            entropy=2.6696461739,
            entropy_stderr=_QUADRATURE,
            curves=(roll,),
            sigma=0.2,
            nodes=512,
        ),
        TwoSpirals(
            name="2spirals", entropy=2.6454502836, entropy_stderr=_QUADRATURE, sigma=0.1, nodes=384
        ),
    )
}


def targets() -> tuple[str, ...]:
    """The names that ``toy`` knows.

    Example:
        >>> targets()
        ('8gaussians', 'pinwheel', 'checkerboard', 'rings', 'circles', 'moons', 'swissroll',
         '2spirals')
    """
    return tuple(_TOYS)


def toy(name: str) -> Target:
    """The 2-D density of that name, with its sampler, its exact log-density and its entropy.

    The densities of FFJORD (Grathwohl et al. 2019) at its shapes and scales. Points that FFJORD
    spaces evenly along a curve are drawn uniformly along it, and components are drawn for each
    point, so that points are independent and their law is exactly the density.

    Args:
        name: one of ``targets()``.

    Raises:
        UnknownNameError: if there is no such density; the message names the nearest.

    Example:
        >>> import torch
        >>> target = toy("checkerboard")
        >>> target.log_prob(torch.tensor([[1.0, 1.0], [1.0, 3.0]])).exp()
        tensor([0.0312, 0.0000])
    """
    if name not in _TOYS:
        raise unknown_name("target", name, _TOYS)
    return _TOYS[name]
