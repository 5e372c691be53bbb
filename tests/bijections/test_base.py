"""The numeric inversion, and maps the other way round."""

from __future__ import annotations

import math

import pytest
import torch

from cnf.bijections import Affine, InversionError, Inverted, Softplus, invert, tolerance_of


def cubic(z):
    return z**3 + z, torch.log(3 * z**2 + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_over_thirty_orders_of_magnitude(dtype):
    magnitude = torch.logspace(-15, 15, 121, dtype=dtype)
    target = torch.cat([-magnitude, magnitude])
    z, log_derivative = invert(cubic, target)
    accuracy = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(cubic(z)[0], target, rtol=accuracy, atol=tolerance_of(dtype))
    torch.testing.assert_close(log_derivative, -cubic(z)[1])


def test_implicit_gradients_of_every_order_up_to_three():
    target = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    power = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def scaled(z):
        return power * torch.sinh(z), torch.log(power * torch.cosh(z))

    numeric, closed = invert(scaled, target)[0], torch.asinh(target / power)
    for _ in range(3):
        mixed = [torch.autograd.grad(z, power, retain_graph=True)[0] for z in (numeric, closed)]
        torch.testing.assert_close(mixed[0], mixed[1], rtol=1e-10, atol=1e-10)
        (numeric,) = torch.autograd.grad(numeric, target, create_graph=True)
        (closed,) = torch.autograd.grad(closed, target, create_graph=True)
        torch.testing.assert_close(numeric, closed, rtol=1e-10, atol=1e-10)


def test_flat_and_kinked_functions():
    # Newton's own iteration diverges on artanh-like slopes and stalls on plateaus
    def plateau(z):
        return torch.tanh(50 * z) + 1e-3 * z, torch.log(50 / torch.cosh(50 * z) ** 2 + 1e-3)

    target = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64)
    z, _ = invert(plateau, target)
    torch.testing.assert_close(plateau(z)[0], target, rtol=0, atol=1e-12)

    def kink(z):
        steep = z > 0.3
        value = torch.where(steep, 100 * (z - 0.3), 0.01 * (z - 0.3))
        return value, torch.where(steep, math.log(100), math.log(0.01)).to(z.dtype)

    z, _ = invert(kink, target)
    torch.testing.assert_close(kink(z)[0], target, rtol=0, atol=1e-12)


def test_bracket_given_or_wrong():
    target = torch.tensor([10.0, -2.0], dtype=torch.float64)
    expected = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for lower, upper in [(-5.0, 5.0), (2.5, 3.0), (-1.0, 2.0), (-9.0, -8.0)]:
        z, _ = invert(
            cubic,
            target,
            lower=torch.full_like(target, lower),
            upper=torch.full_like(target, upper),
        )
        torch.testing.assert_close(z, expected)
    z, _ = invert(cubic, target, guess=torch.tensor([1e6, -1e6], dtype=torch.float64))
    torch.testing.assert_close(z, expected)


def test_empty_and_not_a_number():
    assert invert(cubic, torch.empty(0, 3))[0].shape == (0, 3)
    z, _ = invert(cubic, torch.tensor([math.nan, 2.0, math.nan]))
    assert z.isnan().tolist() == [True, False, True]


def test_unreachable_is_an_error_that_says_so():
    with pytest.raises(InversionError, match=r"1 of 2 values .* the first of them 1\.5"):
        invert(lambda z: (torch.tanh(z), -2 * torch.cosh(z).log()), torch.tensor([0.5, 1.5]))


def test_inverted_swaps_everything():
    swapped = Inverted(Affine())
    value, parameters = torch.tensor(0.7), torch.tensor([0.3, 0.2])
    assert swapped.size == 2
    assert swapped.forward(value, parameters) == Affine().inverse(value, parameters)
    assert swapped.inverse(value, parameters) == Affine().forward(value, parameters)
    assert Inverted(Softplus()).domain == (0.0, math.inf)
    assert Inverted(Softplus()).codomain == (-math.inf, math.inf)
