from __future__ import annotations

import math

import pytest
import torch

from cnf.data import energies, energy
from cnf.registry import UnknownNameError

RANGES = {"banana": ((-9.0, 9.0), (-5.0, 24.0)), "funnel": ((-12.0, 9.0), (-300.0, 300.0))}


@pytest.mark.parametrize("name", energies())
def test_the_normaliser_is_the_integral(name):
    one = energy(name)
    (left, right), (low, high) = RANGES.get(name, ((-7.0, 7.0), (-7.0, 7.0)))
    u = torch.arange(left, right, 0.04, dtype=torch.float64)
    v = torch.arange(low, high, 0.04, dtype=torch.float64)
    total = sum(
        one.log_prob(torch.stack(torch.meshgrid(part, v, indexing="ij"), -1)).exp().sum().item()
        for part in u.split(20)
    )
    # the funnel is narrower than the grid at its left end
    tolerance = 1e-3 if name == "funnel" else 1e-5
    assert math.log(total * 0.04**2) == pytest.approx(0.0, abs=tolerance)


def test_known_values_of_the_papers_potentials():
    x = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    ring = energy("ring")(x)
    assert ring[0].item() == pytest.approx(-math.log1p(math.exp(-0.5 * (4 / 0.6) ** 2)))
    assert ring[1].item() == pytest.approx(12.5 + 0.5 * (2 / 0.6) ** 2 - math.log(2))
    assert energy("wave")(x[2]).item() == pytest.approx(0.0)
    assert energy("split")(x[2]).item() == pytest.approx(0.0, abs=1e-12)
    assert energy("step")(x[2] + torch.tensor([0.0, -1.5])).item() == pytest.approx(
        -math.log(1 + math.exp(-0.5 * (1.5 / 0.4) ** 2))
    )


@pytest.mark.parametrize("name", energies())
def test_shapes_dtypes_and_gradients(name):
    x = torch.randn(3, 5, 2, requires_grad=True)
    value = energy(name)(x)
    assert value.shape == (3, 5)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.isfinite().all()
    assert energy(name)(torch.zeros(0, 2)).shape == (0,)


def test_mistakes_are_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'ring'"):
        energy("rign")
    with pytest.raises(ValueError, match="an energy on the plane"):
        energy("ring")(torch.zeros(3))
