"""Solves that cannot work: each ends in its named error, in seconds, whatever Python's flags."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from cnf.ode import (
    METHODS,
    NonFiniteState,
    SecondOrderGradient,
    Solver,
    SolverError,
    SolverWarning,
    StepUnderflow,
    TooManySteps,
    UntrackedTensor,
    count_nfe,
    integrate,
)
from cnf.registry import decode, encode

UNIT = torch.tensor([0.0, 1.0])
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def alone(velocity):
    """A right-hand side of one part."""
    return lambda t, state: (velocity(t, state[0]),)


BROKEN = {
    "NaN everywhere": (lambda t, x: x * math.nan, NonFiniteState),
    "infinite everywhere": (lambda t, x: x + math.inf, NonFiniteState),
    "NaN from half time": (lambda t, x: torch.where(t > 0.5, math.nan, x), NonFiniteState),
    "square root of what falls below zero": (lambda t, x: -3 * x.sqrt() - 1, NonFiniteState),
    "one bad sample": (
        lambda t, x: torch.where(torch.arange(len(x)).view(-1, 1) == 2, math.nan, x),
        NonFiniteState,
    ),
    "infinity in finite time": (lambda t, x: 2 * x**2, SolverError),
    "infinity in finite time, fast": (lambda t, x: torch.exp(5 * x**2), SolverError),
    "stiff": (lambda t, x: -1e7 * (x - torch.cos(t)), TooManySteps),
    "chatter": (lambda t, x: -1e3 * torch.sign(x - 0.7 * torch.cos(t)), SolverError),
    "pole on the way": (lambda t, x: 1 / (t - 0.37) ** 2 + 0 * x, SolverError),
    "noise": (lambda t, x: torch.sin(1e6 * x + 1e7 * t) * 1e5, SolverError),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_field_ends_in_a_named_error(name, gradient, dtype):
    velocity, kind = BROKEN[name]
    start = torch.ones(4, 2, dtype=dtype)
    began = time.monotonic()
    with pytest.raises(kind) as caught, torch.no_grad():
        integrate(
            alone(velocity), (start,), UNIT.to(dtype), Solver(gradient=gradient, max_steps=100)
        )
    assert time.monotonic() - began < 10
    error = caught.value
    assert 0 <= error.time <= 1
    assert error.nfe > 0
    assert error.direction == "forward"
    assert "forward pass" in str(error)
    assert error.advice in str(error)


# implicit Adams says by itself that it does not converge
@pytest.mark.filterwarnings("ignore:Functional iteration")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_a_nan(method):
    solver = Solver(method)
    for velocity in (BROKEN["NaN everywhere"][0], BROKEN["NaN from half time"][0]):
        with pytest.raises(NonFiniteState):
            integrate(alone(velocity), (torch.ones(3, 2),), UNIT, solver)


@pytest.mark.filterwarnings("ignore:Functional iteration")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_a_blow_up(method):
    with pytest.raises(SolverError):
        integrate(
            alone(lambda t, x: 2 * x**3), (torch.ones(3, 2),), UNIT, Solver(method, max_steps=400)
        )


def test_a_stiff_field_takes_seconds_with_the_default_limits():
    began = time.process_time()
    with pytest.raises(TooManySteps, match="max_steps=2000") as caught:
        integrate(alone(lambda t, x: -1e7 * x + t), (torch.ones(8, 2),), UNIT, Solver())
    assert time.process_time() - began < 10
    assert caught.value.nfe > 2000


def test_lsoda_solves_what_is_stiff_and_is_bounded():
    stiff = alone(lambda t, x: -1e5 * (x - torch.cos(t)))
    (y,), stats = integrate(stiff, (torch.ones(2).double(),), UNIT.double(), Solver("scipy_solver"))
    assert torch.allclose(y[-1], torch.cos(UNIT.double()[1]), atol=1e-3)
    assert stats.nfe > 0
    with pytest.raises(TooManySteps, match="ten evaluations"):
        integrate(
            alone(lambda t, x: torch.sin(300 * t) * x),
            (torch.ones(2).double(),),
            UNIT.double(),
            Solver("scipy_solver", rtol=1e-8, max_steps=20),
        )


def test_scipy_giving_up_is_an_error_and_not_a_short_answer():
    with pytest.raises(SolverError):
        integrate(
            alone(lambda t, x: 2 * x**2),
            (torch.ones(2).double(),),
            torch.linspace(0, 1, 5).double(),
            Solver("scipy_solver", max_steps=100),
        )


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_nan_in_the_gradient_alone_is_named(gradient):
    scale = torch.tensor(0.0, requires_grad=True)
    # the value is finite, the derivative of sqrt at zero times zero is not
    rhs = alone(lambda t, x: x * torch.sqrt(scale * 0) + scale)
    (y,), _ = integrate(
        rhs, (torch.ones(3),), UNIT, Solver(gradient=gradient), (scale,), name="first"
    )
    with pytest.raises(NonFiniteState, match=r"block 'first'.*gradient.*backward pass") as caught:
        y[-1].sum().backward()
    assert caught.value.direction == "backward"
    assert caught.value.nfe > 0


def test_a_nan_in_the_state_adjoint_is_named():
    x = torch.zeros(3, requires_grad=True)
    rhs = alone(lambda t, x: torch.sqrt(x - x.detach()) + 1)
    for method in ("dopri5", "rk4"):
        (y,), _ = integrate(rhs, (x,), UNIT, Solver(method))
        with pytest.raises(NonFiniteState, match="backward pass"):
            y[-1].sum().backward()


def test_the_backward_pass_has_a_limit_of_steps_too():
    x = torch.ones(3, requires_grad=True)
    solver = Solver(rtol=1e-3, atol=1e-3, adjoint_rtol=1e-9, adjoint_atol=1e-9, max_steps=30)
    rhs = alone(lambda t, x: torch.sin(30 * t) * x)
    (y,), _ = integrate(rhs, (x,), UNIT, solver)
    with pytest.raises(TooManySteps, match="backward pass") as caught:
        y[-1].sum().backward()
    assert 0 <= caught.value.time <= 1


def test_errors_reach_a_caller_whose_backward_runs_on_another_thread():
    x = torch.ones(3, requires_grad=True)
    with count_nfe() as nfe:
        (y,), _ = integrate(alone(lambda t, x: -x), (x,), UNIT, Solver())
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert nfe.backward > 0


def test_an_overflowing_trial_step_is_tried_again_smaller():
    # torchdiffeq alone takes the NaN of one trial for the end: its next step is zero
    def rhs(t, state):
        (x,) = state
        return (torch.where(x > 1.5, math.nan, -x * 0 + 0.4),)

    (y,), stats = integrate(
        rhs, (torch.ones(1).double(),), UNIT.double(), Solver(options={"first_step": 5.0})
    )
    assert torch.allclose(y[-1], torch.tensor(1.4).double())

    def edge(t, state):
        return (torch.where(t > 1, math.nan, state[0] * 0 + 1),)

    (y,), _ = integrate(edge, (torch.ones(1),), UNIT, Solver(options={"first_step": 5.0}))
    assert torch.allclose(y[-1], torch.tensor(2.0))
    assert stats.accepted >= 1


def test_a_nan_hidden_in_a_part_outside_the_norm_is_found():
    def rhs(t, state):
        return (-state[0], torch.where(t > 0.4, math.nan, state[1]))

    state = (torch.ones(3, 2), torch.ones(3))
    for in_norm in (None, (True, False)):
        with pytest.raises(NonFiniteState):
            integrate(rhs, state, UNIT, Solver(), in_norm=in_norm)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
def test_a_nan_at_the_start_is_named(method):
    with pytest.raises(NonFiniteState):
        integrate(alone(lambda t, x: -x), (torch.tensor([1.0, math.nan]),), UNIT, Solver(method))


def test_min_step_is_a_limit_and_not_a_licence():
    with pytest.raises(StepUnderflow) as caught:
        integrate(
            alone(lambda t, x: torch.sign(t - 0.3) * 1e3 + 0 * x),
            (torch.ones(2).double(),),
            UNIT.double(),
            Solver(rtol=1e-9, atol=1e-9, min_step=1e-3),
        )
    assert caught.value.step < 1e-3
    assert abs(caught.value.time - 0.3) < 0.05


def test_a_step_that_float32_cannot_make_is_an_underflow():
    with pytest.raises(StepUnderflow) as caught:
        integrate(alone(lambda t, x: x**2), (torch.ones(2),), torch.tensor([0.0, 2.0]), Solver())
    assert abs(caught.value.time - 1) < 1e-2


# --- second derivatives and undeclared tensors ------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_second_derivatives_are_refused_with_the_mode_that_has_them(gradient):
    x = torch.ones(3, requires_grad=True)
    (y,), _ = integrate(alone(lambda t, x: x.sin()), (x,), UNIT, Solver(gradient=gradient))
    with pytest.raises(SecondOrderGradient, match="gradient='backprop'"):
        torch.autograd.grad(y[-1].sum(), x, create_graph=True)
    with pytest.raises(SecondOrderGradient, match=gradient):
        torch.autograd.functional.hessian(
            lambda x: integrate(alone(lambda t, x: x.sin()), (x,), UNIT, Solver(gradient=gradient))[
                0
            ][0].sum(),
            torch.ones(2),
        )


@pytest.mark.parametrize(
    ("gradient", "method"),
    [
        *itertools.product(["adjoint", "checkpoint", "backprop"], ["dopri5", "midpoint"]),
        *itertools.product(["adjoint", "backprop"], ["implicit_adams"]),
    ],
)
@pytest.mark.parametrize("changed", ["weight", "context"])
def test_a_backward_pass_after_its_parameters_have_changed_is_refused(gradient, method, changed):
    hidden, context, solver = nn.Linear(3, 3), torch.ones(3), Solver(method, gradient=gradient)
    rhs = alone(lambda t, x: hidden(context * x).tanh())
    (y,), _ = integrate(rhs, (torch.ones(3),), UNIT, solver, (*hidden.parameters(), context))
    with torch.no_grad():
        (context if changed == "context" else hidden.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y[-1].sum().backward()


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_an_undeclared_tensor_is_refused(gradient):
    x, hidden = torch.ones(3, requires_grad=True), nn.Linear(3, 3)
    declared = tuple(hidden.parameters())
    rhs = alone(lambda t, x: hidden(x))
    (y,), _ = integrate(rhs, (x,), UNIT, Solver(gradient=gradient), declared[:1])
    with pytest.raises(UntrackedTensor, match=r"shape \(3,\)"):
        y[-1].sum().backward()
    # a tensor computed from declared ones is covered by them, and so is what stands behind one
    inner = hidden.weight * 2
    (y,), _ = integrate(alone(lambda t, x: x @ inner), (x,), UNIT, Solver(gradient=gradient),
                        (hidden.weight,))  # fmt: skip
    y[-1].sum().backward()
    (y,), _ = integrate(alone(lambda t, x: x @ inner), (x,), UNIT, Solver(gradient=gradient),
                        (inner,))  # fmt: skip
    y[-1].sum().backward()


def test_an_undeclared_tensor_is_no_matter_to_backprop():
    hidden = nn.Linear(3, 3)
    rhs = alone(lambda t, x: hidden(x))
    (y,), _ = integrate(rhs, (torch.ones(3),), UNIT, Solver(gradient="backprop"))
    y[-1].sum().backward()
    assert hidden.weight.grad.abs().sum() > 0


# --- the fallback -----------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
def test_the_fallback_takes_over_with_a_warning(gradient):
    # a jump in time that the adaptive method cannot resolve at this tolerance
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    rhs = alone(lambda t, x: torch.sign(t - 0.305) * x)
    solver = Solver(
        rtol=1e-10, atol=1e-10, min_step=1e-4, gradient=gradient, fallback="rk4", fallback_steps=100
    )
    with pytest.warns(SolverWarning, match="falling back to 100 steps of rk4"):
        (y,), stats = integrate(rhs, (x,), UNIT.double(), solver)
    assert stats.nfe == 400
    expected = math.exp(0.695 - 0.305)
    assert torch.allclose(y[-1], torch.tensor(expected).double(), rtol=5e-3)
    y[-1].sum().backward()
    assert torch.allclose(x.grad, torch.tensor(expected).double(), rtol=5e-3)


def test_the_fallback_takes_over_in_the_backward_pass():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    solver = Solver(
        rtol=1e-7, atol=1e-7, adjoint_rtol=1e-11, adjoint_atol=1e-11, max_steps=30, fallback="rk4"
    )
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with count_nfe() as nfe:
        (y,), _ = integrate(
            alone(lambda t, x: rate * torch.cos(9 * t) * x), (x,), UNIT.double(), solver, (rate,)
        )
    with pytest.warns(SolverWarning, match="backward pass"):
        y[-1].sum().backward()
    integral = math.sin(9.0) / 9
    assert torch.allclose(x.grad, torch.tensor(math.exp(0.5 * integral)).double(), rtol=1e-5)
    assert torch.allclose(
        rate.grad, torch.tensor(3 * integral * math.exp(0.5 * integral)).double(), rtol=1e-5
    )
    assert nfe.backward > 160


def test_a_nan_is_not_handed_to_the_fallback():
    with pytest.raises(NonFiniteState):
        integrate(
            alone(BROKEN["NaN everywhere"][0]), (torch.ones(2),), UNIT, Solver(fallback="rk4")
        )


# --- what the user says wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri6"}, "Did you mean 'dopri8'"),
        ({"adjoint_method": "rk5"}, "Did you mean 'rk4'"),
        ({"gradient": "back"}, "Did you mean 'backprop'"),
        ({"norm": "samples"}, "Did you mean 'sample'"),
        ({"fallback": "dopri5"}, "no fixed-grid method"),
        ({"rtol": 0.0}, "rtol must be a positive number"),
        ({"atol": math.nan}, "atol must be a positive number"),
        ({"max_steps": 0}, "max_steps must be a positive integer"),
        ({"step_size": 0.1}, "step_size is for fixed-grid methods"),
        ({"options": {"first_stp": 0.1}}, "Did you mean 'first_step'"),
        ({"options": {"min_step": 0.1}}, r"say Solver\(min_step"),
        ({"method": "rk4", "options": {"step_size": 0.1}}, r"say Solver\(step_size"),
        ({"method": "scipy_solver", "gradient": "backprop"}, "use gradient='adjoint'"),
        ({"method": "implicit_adams", "gradient": "checkpoint"}, "use a Runge-Kutta method"),
        ({"checkpoints": 4}, "belongs to gradient='checkpoint'"),
        ({"gradient": "checkpoint", "options": {"jump_t": (0.5,)}}, "none of the options"),
    ],
)
def test_a_solver_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Solver(**arguments)


def test_a_solver_is_a_value():
    solver = Solver("bosh3", options={"first_step": 0.1, "jump_t": (0.25, 0.5)})
    assert decode(encode(solver)) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert copy.deepcopy(solver) == solver
    assert len({Solver(), Solver(), solver}) == 2


def test_an_error_can_cross_a_process_border():
    error = pickle.loads(pickle.dumps(StepUnderflow("small", 0.5, 1e-9, 7, "backward")))
    assert (error.time, error.step, error.nfe, error.direction) == (0.5, 1e-9, 7, "backward")
    assert str(error).startswith("small (backward pass, t = 0.5, step 1e-09, 7 evaluations so far)")


def test_wrong_calls_say_what_is_wrong():
    decay = alone(lambda t, x: -x)
    x = torch.ones(2)
    with pytest.raises(TypeError, match="tuple of tensors"):
        integrate(decay, x, UNIT, Solver())
    with pytest.raises(TypeError, match="one floating-point dtype"):
        integrate(decay, (x, x.double()), UNIT, Solver())
    with pytest.raises(ValueError, match="increase or decrease"):
        integrate(decay, (x,), torch.tensor([0.0, 1.0, 0.5]), Solver())
    with pytest.raises(ValueError, match="increase or decrease"):
        integrate(decay, (x,), torch.tensor([0.0, math.nan]), Solver())
    with pytest.raises(ValueError, match="scale the velocity's clock"):
        integrate(decay, (x,), UNIT.clone().requires_grad_(), Solver())
    with pytest.raises(ValueError, match="one-dimensional floating-point"):
        integrate(decay, (x,), torch.tensor([0, 1]), Solver())
    with pytest.raises(TypeError, match=r"torch\.tensor\(times\)"):
        integrate(decay, (x,), [0.0, 1.0], Solver())
    with pytest.raises(ValueError, match="evenly spaced"):
        integrate(decay, (x,), torch.tensor([0.0, 0.1, 1.0]), Solver("implicit_adams"))
    with pytest.raises(ValueError, match="in_norm must have one entry"):
        integrate(decay, (x,), UNIT, Solver(), in_norm=(False,))
    with pytest.raises(ValueError, match=r"has \[\(2, 2\)\]"):
        integrate(alone(lambda t, x: torch.ones(2, 2)), (x,), UNIT, Solver())
    with pytest.raises(TypeError, match="must have the state's dtype"):
        integrate(alone(lambda t, x: x.double()), (x,), UNIT, Solver())
    with pytest.raises(TooManySteps, match="the grid has 5000 steps"):
        integrate(decay, (x,), UNIT, Solver("euler", step_size=2e-4))


def test_the_guard_stands_without_assert_statements():
    program = """
import math, torch
from cnf.ode import *
assert False, "assertions are on"
unit, x = torch.tensor([0.0, 1.0]), torch.ones(3, requires_grad=True)
fields = {
    "NonFiniteState": lambda t, s: (s[0] * math.nan,),
    "TooManySteps": lambda t, s: (-1e7 * (s[0] - torch.cos(t)),),
    "StepUnderflow": lambda t, s: (4 * s[0] ** 2,),
}
for gradient in ("adjoint", "backprop", "checkpoint"):
    for name, rhs in fields.items():
        try:
            limit = 100 if name == "TooManySteps" else 1000
            integrate(rhs, (x,), unit, Solver(gradient=gradient, max_steps=limit))
        except SolverError as error:
            print(type(error).__name__ == name)
for method in ("euler", "rk4", "implicit_adams", "scipy_solver", "dopri8"):
    try:
        integrate(fields["NonFiniteState"], (x,), unit, Solver(method))
    except NonFiniteState as error:
        print(True)
y, _ = integrate(lambda t, s: (torch.sqrt(s[0] - s[0].detach()) + 1,), (x,), unit, Solver())
try:
    y[0].sum().backward()
except NonFiniteState:
    print(True)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == ["True"] * 15, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", [Solver("rk4", step_size=0.1), Solver("dopri5")], ids=str)
def test_a_device_that_is_not_waited_for_tells_the_same_place(solver):
    def told(device):
        start = (torch.ones(3, 2, device=device),)
        with pytest.raises(NonFiniteState) as caught:
            integrate(lambda t, state: (state[0] / (t < 0.55),), start, UNIT, solver)
        return caught.value.time

    assert told("cuda") == pytest.approx(told("cpu"), rel=1e-3)
