"""Path costs on linear, rotating and timed fields, whose integrals are known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import cnf
from cnf.costs import (
    DiagonalNorm,
    DirectionalDerivative,
    HJBResidual,
    JacobianNorm,
    KineticEnergy,
    OffDiagonalNorm,
    TaylorDerivative,
    VelocityNorm,
)
from cnf.registry import decode, encode
from cnf.transforms import Continuous

F64 = torch.float64
TIGHT = cnf.Solver(rtol=1e-8, atol=1e-8)
COSTS = [
    KineticEnergy(), JacobianNorm(), DiagonalNorm(), OffDiagonalNorm(), DirectionalDerivative(),
    DirectionalDerivative(steady=True), TaylorDerivative(2), TaylorDerivative(3),
    TaylorDerivative(4), VelocityNorm(1), VelocityNorm(2),
]  # fmt: skip


class Linear(nn.Module):
    """V = A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix, dtype=F64))

    def forward(self, t, x, context=None):
        return x @ self.matrix.T


class Falling(nn.Module):
    """V = (g t, 0, …): x = x₀ + g t²/2 in the first coordinate."""

    def forward(self, t, x, context=None):
        return 3 * t * torch.eye(x.shape[-1], dtype=x.dtype)[0] + 0 * x


class Quadratic(nn.Module):
    """V = -∇Φ of Φ = ½ a x² + b·t: the gradient field with known residual |b - ½ a² x²|."""

    def potential(self, t, x, context=None):
        return 0.5 * 0.7 * x.square().sum(-1) + 5 * t

    def forward(self, t, x, context=None):
        return -0.7 * x


class Straight(nn.Module):
    """V = x/(1 + t) = -∇Φ, Φ = -‖x‖²/(2(1 + t)): straight paths at constant speed."""

    def potential(self, t, x, context=None):
        return -0.5 * x.square().sum(-1) / (1 + t)

    def forward(self, t, x, context=None):
        return x / (1 + t)


def points(*shape: int, seed: int = 1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def measure(field, cost, z, direction="forward", **more):
    """The cost's integral from z, whichever way the same path is walked."""
    transform = Continuous(field, solver=TIGHT)
    # in the norm, so that the integral is as accurate as a closed form asks for
    request = cnf.Request(costs=(cost,), costs_in_norm=True, **more)
    value = z if direction == "forward" else transform(z).value
    return getattr(transform, direction)(value, None, request).costs[cost.name]


DIAGONAL = [0.5, -1.0, 0.2]
RATES = torch.tensor(DIAGONAL, dtype=F64)
MIXED = [[0.5, 2.0, 0.0], [0.0, -1.0, 3.0], [1.0, 0.0, 0.2]]


def moments(z, power):
    """∫ Σ aᵢ²ᵖ xᵢ(t)² dt on x = exp(a t) z."""
    return (RATES ** (2 * power) * z**2 * torch.expm1(2 * RATES) / (2 * RATES)).sum(-1)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("cost", "power"),
    [
        (KineticEnergy(), 1),
        (TaylorDerivative(1), 1),
        (TaylorDerivative(2), 2),
        (TaylorDerivative(3), 3),
        (TaylorDerivative(4), 4),
        (DirectionalDerivative(), 2),
        (DirectionalDerivative(steady=True), 2),
    ],
    ids=str,
)
def test_derivatives_along_a_linear_field(cost, power, direction):
    z, field = points(5, 3), Linear(RATES.diag().tolist())
    found = measure(field, cost, z, direction)
    torch.testing.assert_close(found, moments(z, power), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_jacobian_norms_in_every_dimension(size, direction):
    matrix = points(size, size, seed=4)
    field, z = Linear(matrix.tolist()), points(4, size)
    diagonal = matrix.diagonal().square().sum()
    expected = {
        JacobianNorm(): matrix.square().sum(),
        DiagonalNorm(): diagonal,
        OffDiagonalNorm(): matrix.square().sum() - diagonal,
    }
    for cost, norm in expected.items():
        torch.testing.assert_close(
            measure(field, cost, z, direction), norm.expand(4), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    "divergence", [cnf.Hutchinson(2), cnf.HutchPlusPlus(2, 2)], ids=["Hutchinson", "Hutch++"]
)
def test_norms_under_an_estimator(divergence):
    field, z = Linear(MIXED), points(1, 3).expand(1500, 3)
    matrix = field.matrix.detach()
    diagonal = matrix.diagonal().square().sum()
    more = {"divergence": divergence, "generator": torch.Generator().manual_seed(0)}
    torch.testing.assert_close(measure(field, DiagonalNorm(), z, **more), diagonal.expand(1500))
    torch.testing.assert_close(
        measure(field, OffDiagonalNorm(), z, **more),
        (matrix.square().sum() - diagonal).expand(1500),
    )
    found = measure(field, JacobianNorm(), z, **more).detach()
    assert found.std() > 0
    error = float(found.mean() - matrix.square().sum())
    assert abs(error) < 4 * float(found.std()) / 1500**0.5


def test_a_rotation():
    field, z = Linear([[0.0, -2.0], [2.0, 0.0]]), points(5, 2)
    square = z.square().sum(-1)
    expected = {
        KineticEnergy(): 4 * square,
        VelocityNorm(2): 2 * square.sqrt(),
        JacobianNorm(): torch.full((5,), 8.0, dtype=F64),
        DiagonalNorm(): torch.zeros(5, dtype=F64),
        OffDiagonalNorm(): torch.full((5,), 8.0, dtype=F64),
        DirectionalDerivative(): 16 * square,
        TaylorDerivative(3): 64 * square,
    }
    for cost, integral in expected.items():
        torch.testing.assert_close(measure(field, cost, z), integral, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        Continuous(field, solver=TIGHT)(z).log_det, torch.zeros(5, dtype=F64), atol=1e-12, rtol=0
    )


def test_the_velocitys_own_change_counts():
    z = points(5, 2)
    for cost, integral in (
        (KineticEnergy(), 3.0),
        (VelocityNorm(1), 1.5),
        (VelocityNorm(2), 1.5),
        (TaylorDerivative(2), 9.0),
        (TaylorDerivative(3), 0.0),
        (DirectionalDerivative(), 9.0),
        (DirectionalDerivative(steady=True), 0.0),
    ):
        found = measure(Falling(), cost, z)
        torch.testing.assert_close(
            found, torch.full((5,), integral, dtype=F64), rtol=1e-6, atol=1e-7
        )


def test_l1_is_the_sum_of_the_coordinates_ways():
    z, field = points(5, 3), Linear(RATES.diag().tolist())
    expected = (z * torch.expm1(RATES)).abs().sum(-1)
    torch.testing.assert_close(measure(field, VelocityNorm(1), z), expected, rtol=1e-6, atol=1e-7)


def test_the_velocitys_norm_has_a_gradient_at_rest():
    field = Linear([[0.0, 0.0], [0.0, 0.0]])
    measure(field, VelocityNorm(2), points(3, 2)).sum().backward()
    assert torch.isfinite(field.matrix.grad).all()


def test_hjb_residual_vanishes_on_straight_paths():
    z = points(5, 2)
    found = measure(Straight(), HJBResidual(), z)
    torch.testing.assert_close(found, torch.zeros(5, dtype=F64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_hjb_residual_of_a_bent_potential(direction):
    z = 0.5 * points(5, 2)
    found = measure(Quadratic(), HJBResidual(), z, direction)
    bend = 0.5 * 0.49 * z.square().sum(-1) * -math.expm1(-1.4) / 1.4
    torch.testing.assert_close(found, 5 - bend, rtol=1e-6, atol=1e-7)


def test_hjb_residual_names_the_field_that_has_no_potential():
    with pytest.raises(TypeError, match="PotentialField; Linear has none"):
        measure(Linear(MIXED), HJBResidual(), points(2, 3))


@pytest.mark.parametrize("clock", [0.5, 2.0])
def test_costs_run_on_the_velocitys_own_time(clock):
    z, field = points(5, 2), Linear([[0.0, -2.0], [2.0, 0.0]])
    found = measure(field, KineticEnergy(), z, clock=clock)
    torch.testing.assert_close(found, clock * 4 * z.square().sum(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clock", [0.0, -1.0, float("nan")])
def test_a_clock_that_does_not_run_forward_is_refused(clock):
    flow = cnf.ffjord(2, hidden=(4,))
    with pytest.raises(ValueError, match="clock multiplies the end time and must be positive"):
        flow.evaluate(points(3, 2).float(), request=cnf.Request(clock=clock))


def test_costs_add_along_a_chain_and_are_positive_both_ways():
    torch.manual_seed(0)
    flow = cnf.ffjord(2, hidden=(8,), blocks=2, solver=TIGHT).double()
    z = points(4, 2)
    request = cnf.Request(costs=tuple(COSTS[:4]))
    there = flow.transform(z, None, request)
    back = flow.transform.inverse(there.value, None, request)
    first = flow.transform[0](z, None, request)
    second = flow.transform[1](first.value, None, request)
    for name, cost in there.costs.items():
        assert (cost > 0).all()
        torch.testing.assert_close(cost, back.costs[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(cost, first.costs[name] + second.costs[name])


def test_asking_for_costs_does_not_change_the_path():
    torch.manual_seed(0)
    flow = cnf.ffjord(2, hidden=(8,)).double()
    z = points(4, 2)
    plain = flow.transform(z)
    with cnf.count_nfe() as alone:
        flow.transform(z)
    with cnf.count_nfe() as watched:
        asked = flow.transform(z, None, cnf.Request(costs=(TaylorDerivative(3),)))
    torch.testing.assert_close(asked.value, plain.value, rtol=1e-14, atol=1e-14)
    assert alone.forward == watched.forward


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize(
    "costs",
    [tuple(COSTS[:4]), *[(cost,) for cost in COSTS[4:]], (HJBResidual(),)],
    ids=lambda costs: costs[0].name,
)
def test_gradient_modes_agree(gradient, costs):
    grads = []
    for mode in (gradient, "backprop"):
        torch.manual_seed(0)
        solver = cnf.Solver(rtol=1e-7, atol=1e-7, gradient=mode)
        if costs == (TaylorDerivative(4),):  # takes a minute at this tolerance
            solver = cnf.Solver("rk4", step_size=0.25, gradient=mode)
        if isinstance(costs[0], HJBResidual):
            field = cnf.nets.PotentialField(2, 8, context_features=1)
            with torch.no_grad():
                field.affine.weight[0, 2] = 50.0  # a residual of one sign: no kink
            transform = Continuous(field, solver=solver).double()
        else:
            field = cnf.nets.TimeMLP(2, (8,), context_features=1)
            if costs == (VelocityNorm(1),):
                with torch.no_grad():
                    field.layers.bias[-2:] = 20.0  # no coordinate turns: no kink
            transform = Continuous(field, solver=solver, trainable_end_time=True).double()
        x, context = points(3, 2).requires_grad_(), points(3, 1, seed=2).requires_grad_()
        request = cnf.Request(costs=costs)
        found = transform.inverse(x, context, request)
        loss = sum(cost.sum() for cost in found.costs.values())
        wanted = [x, context, *transform.parameters()]
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for ours, theirs in zip(*grads, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cost", [*COSTS, HJBResidual()], ids=str)
def test_records_come_back(cost):
    assert decode(encode(cost)) == cost
    assert len({cost.name for cost in COSTS}) == len(COSTS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cost.order = 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="order 1 or 2, got 3"):
        VelocityNorm(3)
    with pytest.raises(ValueError, match="from 1 to 6, got 0"):
        TaylorDerivative(0)
