"""Gradients: every mode against closed forms, finite differences and each other; their memory."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from cnf.ode import Solver, count_nfe, integrate

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
MODES = {
    "adjoint": {"gradient": "adjoint"},
    "adjoint, full norm": {"gradient": "adjoint", "seminorm": False},
    "adjoint, norm per sample": {"gradient": "adjoint", "norm": "sample"},
    "backprop": {"gradient": "backprop"},
    "checkpoint": {"gradient": "checkpoint"},
    "checkpoint, few kept": {"gradient": "checkpoint", "checkpoints": 4},
}


class Problem:
    """A small field with a state, parameters, a context through an encoder, and a clock."""

    # whether what is only integrated is said to be
    parted = False

    def __init__(self, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x = draw(4, 2).requires_grad_()
        self.weight = (0.5 * draw(2, 2)).requires_grad_()
        self.bias = (0.1 * draw(2)).requires_grad_()
        self.encoder = draw(3, 2).requires_grad_()
        self.log_time = torch.tensor(0.2, dtype=dtype, requires_grad=True)
        self.raw = draw(4, 3)
        self.weights = draw(2, 4, 2), draw(2, 4)

    @property
    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "weight", "bias", "encoder", "log_time")
        return {name: getattr(self, name) for name in names}

    def loss(self, solver: Solver, times: Tensor = UNIT) -> Tensor:
        context, clock = self.raw @ self.encoder, self.log_time.exp()
        times = times.to(self.x)

        def hidden(t: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight + self.bias + torch.sin(clock * t) * context)

        def velocity(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (clock * hidden(t, state[0]),)

        def rhs(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            units = hidden(t, state[0])
            trace = ((1 - units**2) * self.weight.diagonal()).sum(-1)
            return clock * units, clock * trace

        start = (self.x, self.x.new_zeros(4))
        parameters = (self.weight, self.bias, context, clock)
        declared = {"integrals": 1, "proper_rhs": velocity} if self.parted else {}
        (x, log_det), _ = integrate(rhs, start, times, solver, parameters, **declared)
        weight_x, weight_log_det = self.weights
        # both ends and what lies between, so that gradients enter on the way
        return (x[1:] * weight_x[: len(x) - 1]).sum() + (
            log_det[1:] * weight_log_det[: len(x) - 1]
        ).sum()


def gradients(problem: Problem, solver: Solver, times: Tensor = UNIT) -> dict[str, Tensor]:
    found = torch.autograd.grad(problem.loss(solver, times), list(problem.leaves.values()))
    return dict(zip(problem.leaves, found, strict=True))


@functools.cache
def differences(times: tuple[float, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """A direction for every leaf, and the loss's slope along it by fourth-order differences."""
    problem, step, found = Problem(), 2e-3, {}
    solver = Solver("dopri8", rtol=1e-12, atol=1e-12, gradient="checkpoint")
    for name, leaf in problem.leaves.items():
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            along = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            start, losses = leaf.clone(), {}
            for shift in (-2, -1, 1, 2):
                leaf.copy_(start + shift * step * along)
                losses[shift] = problem.loss(solver, torch.tensor(times, dtype=torch.float64))
            leaf.copy_(start)
            slope = 8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])
            found[name] = along, slope / (12 * step)
    return found


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.7, -0.2)])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_finite_differences(mode, times):
    solver = Solver("dopri8", rtol=1e-10, atol=1e-10, **MODES[mode])
    found = gradients(Problem(), solver, torch.tensor(times, dtype=torch.float64))
    for name, (along, slope) in differences(times).items():
        assert torch.allclose((found[name] * along).sum(), slope, rtol=1e-8, atol=1e-8), name


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_the_modes_agree_with_each_other(method):
    problem = Problem()
    exact = gradients(problem, Solver("dopri8", rtol=1e-9, atol=1e-9, gradient="checkpoint"))
    tolerance, bound = {"bosh3": (1e-5, 1e-3), "rk4": (None, 1e-5)}[method]
    given = {"step_size": 0.05} if tolerance is None else {"rtol": tolerance, "atol": tolerance}
    for mode in MODES.values():
        for name, gradient in gradients(problem, Solver(method, **given, **mode)).items():
            assert torch.allclose(gradient, exact[name], rtol=bound, atol=bound), (mode, name)


@pytest.mark.parametrize("mode", ["adjoint", "backprop", "checkpoint"])
def test_float32_gradients_are_right_to_its_digits(mode):
    exact = gradients(Problem(), Solver("dopri8", rtol=1e-9, atol=1e-9, gradient="checkpoint"))
    found = gradients(Problem(torch.float32), Solver(gradient=mode))
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient.double(), exact[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams", "scipy_solver"])
@pytest.mark.parametrize("adjoint_method", ["dopri5", "bosh3", "midpoint", "scipy_solver"])
def test_the_backward_pass_may_have_its_own_method(method, adjoint_method):
    problem = Problem()
    solver = Solver(method, rtol=1e-7, atol=1e-7, adjoint_method=adjoint_method, adjoint_rtol=1e-6)
    exact = gradients(problem, Solver("dopri8", rtol=1e-9, atol=1e-9, gradient="checkpoint"))
    for name, gradient in gradients(problem, solver).items():
        assert torch.allclose(gradient, exact[name], rtol=1e-3, atol=2e-3), name


@pytest.mark.parametrize("methods", [("rk4", "dopri5"), ("dopri5", "rk4")])
def test_a_step_size_is_of_the_pass_with_a_fixed_grid(methods):
    method, adjoint_method = methods
    solver = Solver(method, step_size=0.01, adjoint_method=adjoint_method)
    exact = gradients(Problem(), Solver("dopri8", rtol=1e-9, atol=1e-9, gradient="checkpoint"))
    for name, gradient in gradients(Problem(), solver).items():
        assert torch.allclose(gradient, exact[name], rtol=1e-3, atol=2e-3), name


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_checkpoint_is_the_gradient_of_backprop(method):
    # the same discrete steps, differentiated: equal at any tolerance, unlike the adjoint
    problem = Problem()
    # which steps they are is ours to choose, and torchdiffeq's under backprop
    sizes = {"first_step": 0.1, "max_step": 0.1} if method == "dopri5" else {}
    solver = Solver(method, rtol=1e-3, atol=1e-3, gradient="backprop", options=sizes)
    backprop = gradients(problem, solver)
    for checkpoints in (None, 1, 2, 3, 5, 8):
        solver = dataclasses.replace(solver, gradient="checkpoint", checkpoints=checkpoints)
        for name, gradient in gradients(problem, solver).items():
            assert torch.allclose(gradient, backprop[name], rtol=1e-9, atol=1e-9), name


def test_backprop_has_second_derivatives():
    x = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)

    def logistic(gradient):
        rhs = lambda t, state: (state[0] * (1 - state[0]),)  # noqa: E731
        solver = Solver("dopri8", rtol=1e-12, atol=1e-12, gradient=gradient)
        return integrate(rhs, (x,), UNIT, solver)[0][0][-1]

    (slope,) = torch.autograd.grad(logistic("backprop").sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    # y = x e / (1 + x (e - 1))
    below = 1 + x * (math.e - 1)
    assert torch.allclose(slope, math.e / below**2, rtol=1e-9)
    assert torch.allclose(curve, -2 * math.e * (math.e - 1) / below**3, rtol=1e-8)


@pytest.mark.parametrize("mode", ["adjoint", "backprop", "checkpoint"])
def test_a_field_may_differentiate_by_the_state(mode):
    # the reverse-mode divergence of v = x³: the state must not claim a graph that it has not
    x = torch.tensor([[0.4], [-0.2]], dtype=torch.float64, requires_grad=True)

    def rhs(t, state):
        with torch.enable_grad():
            at = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            velocity = -(at**3)
            (slope,) = torch.autograd.grad(velocity.sum(), at, create_graph=True)
        return velocity, slope.sum(-1)

    solver = Solver(rtol=1e-9, atol=1e-9, gradient=mode)
    (_, log_det), _ = integrate(rhs, (x, x.new_zeros(2)), UNIT, solver)
    (slope,) = torch.autograd.grad(log_det[-1].sum(), x)
    # dy/dx = (1 + 2 x²)^(-3/2)
    assert torch.allclose(log_det[-1], -1.5 * torch.log1p(2 * x**2).sum(-1), atol=1e-8)
    assert torch.allclose(slope, -6 * x / (1 + 2 * x**2), atol=1e-7)


def test_going_backward_twice_gives_the_same():
    for mode in ("adjoint", "backprop", "checkpoint"):
        problem = Problem()
        with count_nfe() as nfe:
            loss = problem.loss(Solver(gradient=mode))
        first = torch.autograd.grad(loss, problem.x, retain_graph=True)
        once = nfe.backward
        second = torch.autograd.grad(loss, problem.x)
        assert torch.equal(first[0], second[0])
        assert nfe.backward == 2 * once


def test_parameters_that_are_not_used_have_no_gradient_and_do_no_harm():
    unused, frozen = torch.ones(2, requires_grad=True), torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    for mode in ("adjoint", "checkpoint"):
        (y,), _ = integrate(
            lambda t, state: (-state[0] * frozen,),
            (x,),
            torch.tensor([0.0, 1.0]),
            Solver(gradient=mode),
            (unused, frozen),
        )
        slopes = torch.autograd.grad(y[-1].sum(), (x, unused), allow_unused=True)
        assert torch.allclose(slopes[0], torch.full((3,), math.exp(-1)), atol=1e-4)
        assert slopes[1] is None or not slopes[1].any()


def test_only_parameters_require_grad():
    for mode in ("adjoint", "backprop", "checkpoint"):
        net = nn.Linear(3, 3)
        (y,), _ = integrate(
            lambda t, state, net=net: (net(state[0]),),
            (torch.ones(5, 3),),
            torch.tensor([0.0, 1.0]),
            Solver(gradient=mode),
            tuple(net.parameters()),
        )
        y[-1].square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_a_constant_velocity_and_a_zero_one():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for mode in MODES.values():
        for velocity in (0.0, 2.0):
            rhs = lambda t, state, v=velocity: (torch.full_like(state[0], v),)  # noqa: E731
            if mode["gradient"] == "adjoint":
                rhs = lambda t, state, v=velocity: (0 * state[0] + v,)  # noqa: E731
            (y,), _ = integrate(rhs, (x,), UNIT, Solver(**mode))
            (slope,) = torch.autograd.grad(y[-1].sum(), x)
            assert torch.allclose(y[-1], x + velocity)
            assert torch.allclose(slope, torch.ones_like(x))


def test_the_adjoint_is_torchdiffeqs_without_the_integrals():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    zero, times = (
        torch.zeros(4, dtype=torch.float64),
        UNIT,
    )  # only two times: torchdiffeq interpolates between
    cotangents = [torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4).double()]

    class Rhs(nn.Module):
        def forward(self, t, state):
            y = torch.tanh(state[0] @ weight + t)
            return y, (y * state[0].sin()).sum(-1)

    known = {"rtol": 1e-12, "atol": 1e-12, "method": "dopri5", "adjoint_params": (weight,)}
    expected = torch.autograd.grad(
        odeint_adjoint(Rhs(), (x, zero), times, **known), (x, weight), cotangents
    )
    for seminorm in (True, False):
        solver = Solver("dopri5", rtol=1e-12, atol=1e-12, seminorm=seminorm)
        solution, _ = integrate(Rhs(), (x, zero), times, solver, (weight,), integrals=1)
        for a, b in zip(
            torch.autograd.grad(solution, (x, weight), cotangents), expected, strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="integrals must leave at least one of the 2 parts"):
        integrate(Rhs(), (x, zero), times, Solver(), integrals=2)


# --- memory -----------------------------------------------------------------------------------


def kept(solver: Solver, features: int = 50) -> tuple[int, int]:
    """The bytes that a forward pass saves for its backward pass, and the accepted steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(features, features, generator=generator, dtype=torch.float64) / 5
    weight.requires_grad_()
    x = torch.randn(8, features, generator=generator, dtype=torch.float64)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (y,), stats = integrate(
            lambda t, state: (torch.tanh(state[0] @ weight),), (x,), UNIT, solver, (weight,)
        )
    del y
    return sum(storages.values()) - weight.numel() * 8, stats.accepted


def test_memory_of_every_mode_as_the_tolerance_tightens():
    state = 8 * 50 * 8
    loose, tight = (
        {
            mode: kept(Solver(rtol=tol, atol=tol, gradient=mode))
            for mode in ("adjoint", "backprop", "checkpoint")
        }
        for tol in (1e-3, 1e-9)
    )
    assert tight["adjoint"][0] < 1.05 * loose["adjoint"][0]
    steps = tight["checkpoint"][1] - loose["checkpoint"][1]
    assert steps > 5
    # one state for each accepted step
    assert tight["checkpoint"][0] - loose["checkpoint"][0] == steps * state
    assert tight["backprop"][0] - loose["backprop"][0] > 6 * steps * state


def test_bounded_checkpoints_are_bounded():
    state = 8 * 50 * 8
    for checkpoints in (1, 2, 8):
        solver = Solver(
            "bosh3", rtol=1e-7, atol=1e-7, gradient="checkpoint", checkpoints=checkpoints
        )
        used, steps = kept(solver)
        assert steps > 6 * checkpoints
        assert used <= checkpoints * state


def test_bounded_checkpoints_cost_recomputation_and_not_more():
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def work(checkpoints):
        solver = Solver("rk4", step_size=1 / 60, gradient="checkpoint", checkpoints=checkpoints)
        with count_nfe() as nfe:
            (y,), _ = integrate(
                lambda t, state: (torch.cos(rate * state[0]),), (torch.ones(2).double(),), UNIT,
                solver, (rate,),
            )  # fmt: skip
            y[-1].sum().backward()
        found = rate.grad.clone()
        rate.grad = None
        return nfe.backward / nfe.forward, found

    reference = work(None)
    assert reference[0] == 1
    for checkpoints, bound in ((60, 2), (8, 3), (4, 5), (1, 35)):
        ratio, found = work(checkpoints)
        assert ratio <= bound
        assert torch.allclose(found, reference[1], rtol=1e-12)
