"""The continuous transform against matrix exponentials, and its gradients in every mode."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import cnf
from cnf.transforms import Continuous

F64 = torch.float64
TIGHT = cnf.Solver("dopri8", rtol=1e-12, atol=1e-12)
MODES = ["adjoint", "backprop", "checkpoint"]


class Linear(nn.Module):
    """V = A x + B c."""

    def __init__(self, size: int, context: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(size, size, generator=generator, dtype=F64))
        self.B = nn.Parameter(torch.randn(size, context, generator=generator, dtype=F64))

    def forward(self, t, x, context=None):
        return x @ self.A.T + (0 if context is None else context @ self.B.T)


def points(*shape: int, seed: int = 1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def exactly(field, x, context, end_time, direction):
    """The same map by the exponential of the augmented matrix [[A, Bc], [0, 0]]."""
    size = len(field.A)
    top = torch.cat([field.A.expand(len(x), -1, -1), (context @ field.B.T).unsqueeze(-1)], -1)
    augmented = torch.cat([top, top.new_zeros(len(x), 1, size + 1)], -2)
    sign = 1 if direction == "forward" else -1
    flow = torch.linalg.matrix_exp(sign * end_time * augmented)
    start = torch.cat([x, x.new_ones(len(x), 1)], -1).unsqueeze(-1)
    value = (flow @ start).squeeze(-1)[:, :-1]
    return value, (sign * end_time * field.A.trace()).expand(len(x))


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("size", [1, 3])
def test_linear_dynamics_are_the_matrix_exponential(size, direction, gradient):
    transform = Continuous(
        Linear(size),
        solver=dataclasses.replace(TIGHT, gradient=gradient),
        end_time=0.7,
        trainable_end_time=True,
    ).double()
    x, context = points(4, size).requires_grad_(), points(4, 2, seed=2).requires_grad_()
    field, wanted = transform.field, [x, context, *transform.parameters()]
    found = getattr(transform, direction)(x, context)
    value, log_det = exactly(field, x, context, transform.log_end_time.exp(), direction)
    torch.testing.assert_close(found.value, value, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.log_det, log_det, atol=1e-9, rtol=1e-9)
    weights = points(4, size, seed=3)

    def gradients(value, log_det):
        return torch.autograd.grad((weights * value).sum() + log_det.square().sum(), wanted)

    for ours, theirs in zip(
        gradients(found.value, found.log_det), gradients(value, log_det), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_a_rotation_keeps_volumes():
    field = Linear(2)
    with torch.no_grad():
        field.A.copy_(torch.tensor([[0.0, -math.pi / 2], [math.pi / 2, 0.0]], dtype=F64))
    mapped = Continuous(field, solver=TIGHT)(torch.tensor([[1.0, 0.0]], dtype=F64))
    quarter = torch.tensor([[0.0, 1.0]], dtype=F64)
    torch.testing.assert_close(mapped.value, quarter, atol=1e-10, rtol=0)
    assert abs(float(mapped.log_det.detach())) < 1e-12


@pytest.mark.parametrize("divergence", [cnf.Exact(), cnf.Exact(1), cnf.Hutchinson(2)], ids=str)
def test_every_gradient_mode_agrees(divergence):
    found = {}
    for gradient in MODES:
        torch.manual_seed(0)
        flow = cnf.ffjord(
            3,
            hidden=(8, 8),
            context_features=2,
            blocks=2,
            trainable_end_time=True,
            solver=dataclasses.replace(TIGHT, gradient=gradient),
        ).double()
        x, context = points(3, 3).requires_grad_(), points(3, 2, seed=2).requires_grad_()
        request = cnf.Request(divergence, generator=torch.Generator().manual_seed(1))
        log_prob = flow.evaluate(x, context, request).log_prob
        wanted = {"x": x, "context": context, **dict(flow.named_parameters())}
        gradients = torch.autograd.grad(log_prob.sum(), list(wanted.values()))
        found[gradient] = dict(zip(wanted, gradients, strict=True))
    for mode in ("adjoint", "checkpoint"):
        for name, theirs in found["backprop"].items():
            assert theirs.any(), name
            torch.testing.assert_close(found[mode][name], theirs, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("gradient", MODES)
def test_end_times_against_finite_differences(gradient):
    torch.manual_seed(0)
    solver = dataclasses.replace(TIGHT, gradient=gradient)
    flow = cnf.ffjord(2, hidden=(8,), trainable_end_time=True, solver=solver).double()
    clock, x = flow.transform.log_end_time, points(4, 2)
    (slope,) = torch.autograd.grad(flow.log_prob(x).sum(), clock)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            clock += step
            values.append(float(flow.log_prob(x).sum()))
            clock -= step
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_a_clock_is_an_end_time():
    torch.manual_seed(0)
    flow = cnf.ffjord(2, hidden=(8,), end_time=1.5, solver=TIGHT).double()
    other = cnf.ffjord(2, hidden=(8,), end_time=0.75, solver=TIGHT).double()
    other.transform.field.load_state_dict(flow.transform.field.state_dict())
    z = points(4, 2)
    fast = other.transform(z, None, cnf.Request(clock=2.0))
    torch.testing.assert_close(fast.value, flow.transform(z).value)
    torch.testing.assert_close(fast.log_det, flow.transform(z).log_det)


def test_the_inverse_walks_the_path_from_its_other_end():
    torch.manual_seed(0)
    part = Continuous(cnf.nets.TimeMLP(2, (8,)), solver=cnf.Solver(rtol=1e-9, atol=1e-9)).double()
    z, times = points(5, 2), torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    known, values = cnf.Inverse(part).trajectory(z, times)
    end = part.inverse(z).value
    there, path = part.trajectory(end, (1 - times).flip(0))
    torch.testing.assert_close(known, times)
    torch.testing.assert_close(values[0], z, atol=1e-7, rtol=0)
    torch.testing.assert_close(values[-1], end, atol=1e-7, rtol=0)
    torch.testing.assert_close(values[1], path[1], atol=1e-7, rtol=0)
    assert torch.equal(there, torch.tensor([0.0, 0.75, 1.0], dtype=F64))


def test_an_end_time_keeps_its_digits_in_double_precision():
    transform = Continuous(cnf.nets.TimeMLP(2, (8,)), end_time=0.3).double()
    assert float(transform.clock(points(1, 2))) == 0.3
    assert "end_time=0.3" in repr(transform)


def test_images_have_an_exact_trace():
    torch.manual_seed(0)
    flow = cnf.ffjord((1, 3, 3), hidden=(3,), solver=TIGHT).double()
    z = points(1, 3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow.transform(z).value, z)
    expected = torch.linalg.slogdet(jacobian.reshape(9, 9)).logabsdet
    torch.testing.assert_close(flow.transform(z).log_det, expected, atol=1e-8, rtol=1e-8)


def test_inference_mode_gives_the_same_density():
    torch.manual_seed(0)
    for flow in (cnf.ffjord(2, hidden=(8,)), cnf.otflow(2), cnf.ffjord((1, 2, 2), hidden=(3,))):
        x = torch.randn(3, *flow.event_shape)
        expected = flow.log_prob(x).detach()
        with torch.inference_mode():
            assert torch.equal(flow.log_prob(x), expected)


@pytest.mark.parametrize(
    "solver",
    [
        cnf.Solver(),
        cnf.Solver(gradient="checkpoint"),
        cnf.Solver(gradient="backprop"),
        cnf.Solver("implicit_adams"),
        cnf.Solver(max_steps=2, fallback="rk4"),
    ],
)
@pytest.mark.filterwarnings("ignore::cnf.SolverWarning")
def test_autocasting_leaves_a_solve_its_digits(solver):
    flow = cnf.ffjord(2, hidden=(8, 8), context_features=1, solver=solver)
    linear = torch.nn.Linear(2, 2)
    x, context = torch.randn(5, 2), torch.randn(5, 1)

    def found(enabled):
        flow.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_prob = flow.log_prob(x, context)
            if solver.gradient != "backprop":  # whose backward pass is torch's own
                log_prob.sum().backward()
        return log_prob.detach(), *[p.grad.clone() for p in flow.parameters() if p.grad is not None]

    for half, full in zip(found(True), found(False), strict=True):
        assert torch.equal(half, full)
    with torch.autocast("cpu", torch.bfloat16):
        value = flow.transform.inverse(linear(x), context.bfloat16()).value
        _, path = flow.trajectory(x, [0.5, 1.0], context)
    assert value.dtype == torch.float32
    assert torch.equal(path, flow.trajectory(x, [0.5, 1.0], context)[1])


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
def test_transformations_of_functions_are_refused_with_the_way(gradient):
    flow = cnf.ffjord(2, hidden=(8,), solver=cnf.Solver(gradient=gradient))
    for call in (
        lambda: torch.func.vmap(flow.log_prob)(torch.zeros(3, 2)),
        lambda: torch.func.jacrev(flow.log_prob)(torch.zeros(3, 2)),
        lambda: torch.func.vmap(torch.func.grad(flow.log_prob))(torch.zeros(3, 2)),
    ):
        with pytest.raises(RuntimeError, match="instead of vmap, give the whole batch"):
            call()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="end_time must be positive"):
        Continuous(Linear(2), end_time=0.0)

    class TimeAndState(torch.nn.Module):
        def forward(self, t, x):
            return -x

    for arguments, message in (
        ({"field": TimeAndState()}, r"takes \(t, x\): give it a context=None"),
        ({"field": lambda t, x, context: -x}, "the field must be a Module"),
        ({"field": Linear(2), "divergence": "hutchinson"}, "the divergence must be a Divergence"),
        ({"field": Linear(2), "solver": "rk4"}, "the solver must be a Solver, got 'rk4'"),
    ):
        with pytest.raises(TypeError, match=message):
            Continuous(**arguments)
