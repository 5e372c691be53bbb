"""Integrals by quadrature: the rule, its error estimate, and flows that use it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import cnf
from cnf.divergence import Divergence
from cnf.nets import TimeMLP
from cnf.ode import Solver, count_nfe, integrate
from cnf.ode.quadrature import PLACES, increment, increment_error, inner_stages
from cnf.ode.runge_kutta import tableau
from tests.test_ode_gradients import Problem, gradients

F64 = torch.float64
UNIT = torch.tensor([0.0, 1.0], dtype=F64)
NODES = torch.tensor([0.0, *PLACES, 1.0], dtype=F64)
MODES = {
    "adjoint": {"gradient": "adjoint"},
    "checkpoint": {"gradient": "checkpoint"},
    "checkpoint, few kept": {"gradient": "checkpoint", "checkpoints": 3},
}


@pytest.mark.parametrize("degree", range(8))
def test_the_rule_is_exact_to_degree_five_and_its_estimate_sees_what_is_not(degree):
    size = -0.5
    values = [(2 * node - 0.3) ** degree for node in NODES]
    exact = size * ((1.7 ** (degree + 1)) - (-0.3) ** (degree + 1)) / (2 * (degree + 1))
    error = abs(float(increment(size, values)) - exact)
    assert (error < 1e-14) == (degree <= 5)
    estimate = abs(float(increment_error(size, values)))
    assert (estimate < 1e-14) == (degree <= 2)


@pytest.mark.parametrize("size", [0.1, 0.5, -1.0])
def test_the_estimate_covers_what_the_rule_leaves(size):
    values = [torch.exp(size * node) for node in NODES]
    error = abs(float(increment(size, values)) - math.expm1(size))
    assert error < abs(float(increment_error(size, values))) < 1e-2 * abs(size) ** 5


def test_a_constant_integrand_has_no_error_whatever_the_rounding():
    values = [torch.full((1000,), 1 / 3).nextafter(torch.tensor(float(i % 2))) for i in range(4)]
    assert increment_error(1.0, values).abs().max() < 1e-7


def test_the_places_lie_on_the_path():
    # dopri5's interpolant has order four: exact where the solution is a polynomial of degree four
    table = tableau("dopri5")
    for place, row in zip(PLACES, inner_stages(table), strict=True):
        for degree in range(1, 5):
            slopes = [degree * node ** (degree - 1) for node in table.nodes]
            found = sum(weight * slope for weight, slope in zip(row, slopes, strict=True))
            assert abs(found - place**degree) < 1e-13


def swing(rate: float):
    """A field at rest in zero, whose divergence swings, and its parts."""
    velocity = lambda t, state: (torch.sin(rate * t) * state[0],)  # noqa: E731
    rhs = lambda t, state: (  # noqa: E731
        *velocity(t, state),
        torch.sin(rate * t).expand(state[0].shape),
    )
    return rhs, velocity


@pytest.mark.parametrize(("rate", "missed"), [(1.0, 1), (10.0, 1), (60.0, 20)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_estimate_alone_can_steer_the_steps(rate, missed, tolerance):
    rhs, velocity = swing(rate)
    start = (torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))
    solver = Solver(rtol=tolerance, atol=tolerance)
    (_, found), stats = integrate(rhs, start, UNIT, solver, integrals=1, proper_rhs=velocity)
    assert abs(float(found[-1]) - (1 - math.cos(rate)) / rate) < missed * tolerance
    assert stats.accepted < 10 * (1 + rate * tolerance**-0.2 / 10)


def test_an_integral_outside_of_the_norm_steers_nothing():
    rhs, velocity = swing(60.0)
    start = (torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))
    _, stats = integrate(
        rhs, start, UNIT, Solver(), integrals=1, proper_rhs=velocity, in_norm=[True, False]
    )
    steered = integrate(rhs, start, UNIT, Solver(), integrals=1, proper_rhs=velocity)[1]
    assert 4 * stats.accepted < steered.accepted


def test_the_order_is_five():
    # the error of one long solve on a grid of our own steps, as the steps are halved
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 3, generator=generator, dtype=F64)
    x = torch.randn(20, 3, generator=generator, dtype=F64)

    def velocity(t, state):
        return (torch.tanh(state[0] @ matrix.T + t),)

    def rhs(t, state):
        (slope,) = velocity(t, state)
        return slope, ((1 - slope**2) * matrix.diagonal()).sum(-1)

    def solve(largest):
        size = {"first_step": largest, "max_step": largest}
        solver = Solver(rtol=1e3, atol=1e3, options=size)
        state = (x, x.new_zeros(20))
        return integrate(rhs, state, UNIT, solver, integrals=1, proper_rhs=velocity)[0][1][-1]

    exact = integrate(rhs, (x, x.new_zeros(20)), UNIT, Solver("dopri8", rtol=1e-13, atol=1e-13))
    errors = [float((solve(1 / n) - exact[0][1][-1]).abs().max()) for n in (4, 8, 16)]
    assert errors[0] / errors[1] > 2**4.5
    assert errors[1] / errors[2] > 2**4.5


class Parted(Problem):
    """The problem of the gradients' tests, with its integral by quadrature."""

    parted = True


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.7, -0.2)])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_whole_state(mode, times):
    times = torch.tensor(times, dtype=F64)
    wanted = gradients(Problem(), Solver("dopri8", rtol=1e-11, atol=1e-11), times)
    found = gradients(Parted(), Solver(rtol=1e-10, atol=1e-10, **MODES[mode]), times)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["adjoint", "checkpoint"])
def test_compiled_steps_are_the_plain_ones(mode):
    torch.compiler.reset()
    plain = Solver(rtol=1e-3, atol=1e-3, norm="batch", gradient=mode)
    wanted = gradients(Parted(), plain)
    with count_nfe() as work:
        found = gradients(Parted(), dataclasses.replace(plain, compile="aot_eager"))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)
    with count_nfe() as eager:
        gradients(Parted(), plain)
    assert (work.accepted, work.rejected) == (eager.accepted, eager.rejected)
    assert (work.forward, work.backward) == (eager.forward + 1, eager.backward + 1)


def test_checkpoint_differentiates_the_steps_that_were_taken():
    torch.manual_seed(0)
    field, x = TimeMLP(2, (8,)).double(), torch.randn(6, 2, dtype=F64)

    def score():
        solver = Solver(rtol=1e-2, atol=1e-2, gradient="checkpoint")
        return cnf.transforms.Continuous(field, solver=solver).inverse(x).log_det.sum()

    parameter = next(field.parameters())
    (found,) = torch.autograd.grad(score(), parameter)
    with torch.no_grad():
        entry, step = parameter.view(-1)[0], 1e-5
        losses = []
        for sign in (1, -1):
            entry += sign * step
            # the same steps, whatever the error: the choice of a step is not differentiated
            losses.append(score())
            entry -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(found.view(-1)[0], slope, rtol=1e-3, atol=1e-6)


class Counted(Divergence):
    """An exact divergence that counts itself."""

    def __init__(self):
        self.exact, self.calls = cnf.Exact(), 0

    def draw(self, *arguments):
        return self.exact.draw(*arguments)

    def __call__(self, *arguments):
        self.calls += 1
        return self.exact(*arguments)


@pytest.mark.parametrize("quadrature", [None, True, False])
def test_three_divergences_a_step(quadrature):
    torch.manual_seed(0)
    divergence, x = Counted(), torch.randn(5, 2)
    flow = cnf.transforms.Continuous(TimeMLP(2, (8,)), divergence, Solver(quadrature=quadrature))
    with torch.no_grad(), count_nfe() as work:
        log_det = flow.inverse(x).log_det
    steps = work.accepted + work.rejected
    assert steps > 1
    # two more to begin with
    assert divergence.calls == 2 + (6 if quadrature is False else 3) * steps
    assert work.forward == 2 + (6 if quadrature is False else 8) * steps
    exact = cnf.transforms.Continuous(flow.field, solver=Solver("dopri8", rtol=1e-9, atol=1e-9))
    with torch.no_grad():
        truth = exact.inverse(x).log_det
    torch.testing.assert_close(log_det, truth, rtol=1e-5, atol=1e-5)


def test_costs_go_by_quadrature_too():
    torch.manual_seed(0)
    field, x = TimeMLP(2, (8,)).double(), torch.randn(5, 2, dtype=F64)
    request = cnf.Request(costs=(cnf.KineticEnergy(), cnf.JacobianNorm()))
    found = [
        cnf.transforms.Continuous(field, solver=Solver(rtol=1e-8, atol=1e-8, quadrature=choice))(
            x, None, request
        ).costs
        for choice in (True, False)
    ]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [{"method": "rk4"}, {"gradient": "backprop"}, {"options": {"jump_t": [0.5]}}],
    ids=str,
)
def test_it_is_refused_where_it_does_not_work(options):
    with pytest.raises(ValueError, match="quadrature=True is for dopri5"):
        Solver(quadrature=True, **options)


def test_a_fallback_carries_integrals_in_the_state():
    solver = Solver(quadrature=True, fallback="rk4", max_steps=2, rtol=1e-9, atol=1e-9)
    flow = cnf.transforms.Continuous(TimeMLP(2, (8,)), solver=solver)
    with pytest.warns(cnf.ode.SolverWarning), torch.no_grad():
        log_det = flow(torch.randn(5, 2)).log_det
    assert log_det.isfinite().all()
