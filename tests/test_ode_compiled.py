"""Compiled steps: the numbers of plain ones, their checks and errors, compiled once a problem."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch import nn

import cnf
from cnf import compiling
from cnf.nets import TimeMLP
from cnf.ode import (
    CompilationError,
    NonFiniteState,
    Solver,
    SolverWarning,
    StepUnderflow,
    TooManySteps,
    UntrackedTensor,
    compiled,
    count_nfe,
    integrate,
)
from cnf.ode.compiled import CompiledSteps
from cnf.transforms import Request
from tests.test_ode_gradients import Problem, gradients

BACKEND = "aot_eager"  # traced and differentiated as by Inductor, without its C++ compiler
MODES = {
    "adjoint": {"gradient": "adjoint"},
    "adjoint, full norm": {"gradient": "adjoint", "seminorm": False, "norm": "batch"},
    "adjoint on a grid": {"gradient": "adjoint", "adjoint_method": "heun2"},
    "checkpoint": {"gradient": "checkpoint"},
    "checkpoint, few kept": {"gradient": "checkpoint", "checkpoints": 3, "norm": "batch"},
}
BETWEEN = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
END = torch.tensor([0.0, 1.0])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
def test_compiled_gradients_are_the_plain_ones(mode):
    plain = Solver("adaptive_heun", rtol=1e-2, atol=1e-2, **MODES[mode])
    wanted = gradients(Problem(), plain, BETWEEN)
    found = gradients(Problem(), dataclasses.replace(plain, compile=BACKEND), BETWEEN)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", ["rk4", "fehlberg2", "euler"])
def test_compiled_methods_are_the_plain_ones(method):
    size = {} if method == "fehlberg2" else {"step_size": 0.25}
    plain = Solver(method, rtol=1e-3, atol=1e-3, gradient="checkpoint", **size)
    with torch.no_grad(), count_nfe() as nfe:
        wanted = Problem().loss(plain)
    with torch.no_grad(), count_nfe() as compiled_nfe:
        found = Problem().loss(dataclasses.replace(plain, compile=BACKEND))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    assert compiled_nfe.accepted == nfe.accepted
    with torch.no_grad(), count_nfe() as again:
        Problem().loss(dataclasses.replace(plain, compile=BACKEND))
    assert again.forward == nfe.forward
    assert compiled_nfe.forward == nfe.forward + 1  # what was compiled was checked


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    plain = Solver("heun2", step_size=0.5, gradient="checkpoint")
    wanted = gradients(Problem(), plain)
    found = gradients(Problem(), dataclasses.replace(plain, compile=True))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("gradient", "divergence"),
    [("adjoint", cnf.Exact()), ("checkpoint", cnf.Hutchinson(probes=2))],
    ids=["adjoint, exact", "checkpoint, probes"],
)
def test_a_flow_is_scored_and_trained_the_same(gradient, divergence):
    torch.manual_seed(0)
    solver = Solver("midpoint", step_size=0.5, gradient=gradient)
    flow = cnf.ffjord(3, hidden=(8,), solver=solver, divergence=divergence).double()
    x = torch.randn(9, 3, dtype=torch.float64)
    costs = {cnf.KineticEnergy(): 0.1, cnf.JacobianNorm(): 0.1}

    def observe(rows):
        flow.zero_grad()
        objective = cnf.MaximumLikelihood(flow, costs=costs, tolerance=None)
        generator = torch.Generator().manual_seed(0)
        objective(cnf.Batch(x[:rows]), generator=generator).total.backward()
        return [parameter.grad.clone() for parameter in flow.parameters()]

    wanted = [observe(rows) for rows in (9, 6)]
    flow.transform.solver = dataclasses.replace(solver, compile=BACKEND)
    found = [observe(9)]
    with torch._dynamo.config.patch(error_on_recompile=True):  # the batch is a variable
        found.append(observe(6))
    for compiled_gradients, plain in zip(found, wanted, strict=True):
        for gradient, expected in zip(compiled_gradients, plain, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-10)


def test_two_flows_of_one_kind_share_their_code():
    solver = Solver("heun2", step_size=0.5, compile=BACKEND)
    x = torch.randn(4, 2)
    flows = [cnf.ffjord(2, hidden=(8,), solver=solver) for _ in range(2)]
    flows[0].log_prob(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        flows[1].log_prob(x).sum().backward()
    plain = dataclasses.replace(solver, compile=False)
    for flow in flows:
        found = flow.log_prob(x)
        flow.transform.solver = plain
        torch.testing.assert_close(found, flow.log_prob(x))


def looped(monkeypatch):
    """The ways that were one piece of code, forward ("arrive") and back ("retrace")."""
    ways = []

    def listen(kind):
        function = getattr(CompiledSteps, kind)

        def listening(self, *arguments):
            found = function(self, *arguments)
            ways.append(kind if found is not None else f"no {kind}")
            return found

        monkeypatch.setattr(CompiledSteps, kind, listening)

    listen("arrive")
    listen("retrace")
    return ways


@pytest.mark.parametrize(
    ("method", "options"),
    [("dopri5", {"norm": "batch"}), ("bosh3", {"min_step": 1e-4})],
)
def test_steps_in_a_loop_are_those_that_are_walked(method, options, monkeypatch):
    torch.manual_seed(0)
    plain = Solver(method, rtol=1e-4, atol=1e-4, **options)
    flow = cnf.ffjord(3, hidden=(8,), context_features=2, solver=plain).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(6)  # so that steps shrink, and some are rejected
    x, context = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)

    def observe(rows):
        with torch.no_grad(), count_nfe() as nfe:
            log_prob = flow.log_prob(x[:rows], context[:rows])
            z = flow.encode(x[:rows], context[:rows])
        return (log_prob, z), (nfe.accepted, nfe.rejected), nfe.forward

    wanted = [observe(rows) for rows in (9, 6)]
    ways = looped(monkeypatch)
    flow.transform.solver = dataclasses.replace(plain, compile=BACKEND)
    found = [observe(9)]
    with torch._dynamo.config.patch(error_on_recompile=True):  # the batch is a variable
        found.append(observe(6))
    assert ways == 4 * ["arrive"]
    assert wanted[0][1][1] > 0
    for looks, (mine, theirs) in zip((2, 0), zip(found, wanted, strict=True), strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-11, rtol=1e-11)
        assert mine[1] == theirs[1]
        assert mine[2] == theirs[2] + looks  # each code that was compiled was checked


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_without_a_swap_the_way_back_is_walked(gradient, monkeypatch):
    ways = looped(monkeypatch)
    plain = Solver("bosh3", rtol=1e-3, atol=1e-3, gradient=gradient)
    wanted = gradients(Problem(), plain)
    found = gradients(Problem(), dataclasses.replace(plain, compile=BACKEND))
    assert ways == ["arrive"]
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient": "adjoint"}, ["arrive", "arrive"]),
        ({"gradient": "checkpoint"}, ["arrive", "retrace"]),
        ({"gradient": "checkpoint", "checkpoints": 3}, []),
    ],
)
def test_a_field_that_is_not_trained_has_gradients_by_points(options, expected, monkeypatch):
    plain = Solver("bosh3", rtol=1e-3, atol=1e-3, **options)
    flow = cnf.ffjord(2, hidden=(4,), solver=plain).double().requires_grad_(False)
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    ways = looped(monkeypatch)
    flow.transform.solver = dataclasses.replace(plain, compile=BACKEND)
    (found,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    assert ways == expected
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "options", "divergence"),
    [
        ("dopri5", {"gradient": "checkpoint", "norm": "batch"}, cnf.Exact()),
        ("bosh3", {"seminorm": False}, cnf.Hutchinson(probes=2)),
    ],
)
def test_a_flow_goes_both_ways_in_loops(method, options, divergence, monkeypatch):
    monkeypatch.setattr(compiled, "ROOM", 5)  # so that one loop is not enough
    torch.manual_seed(0)
    plain = Solver(method, rtol=1e-4, atol=1e-4, **options)
    flow = cnf.ffjord(
        3,
        hidden=(4,),
        context_features=1,
        solver=plain,
        divergence=divergence,
        trainable_end_time=True,
    ).double()
    with torch.no_grad():
        for parameter in flow.transform.field.parameters():
            parameter.mul_(4)
    next(flow.transform.field.parameters()).requires_grad_(False)  # nothing is asked of one
    x, context = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)

    def observe(rows):
        flow.zero_grad()
        inputs = [part[:rows].clone().requires_grad_() for part in (x, context)]
        request = Request(generator=torch.Generator().manual_seed(0), costs=[cnf.KineticEnergy()])
        with count_nfe() as nfe:
            found = flow.evaluate(*inputs, request)
            (found.log_prob.sum() + found.costs["kinetic_energy"].sum()).backward()
        grads = [part.grad for part in (*inputs, *flow.parameters())]
        return [found.log_prob.detach(), *grads], (nfe.accepted, nfe.rejected), nfe

    wanted = [observe(rows) for rows in (9, 6)]
    ways = looped(monkeypatch)
    flow.transform.solver = dataclasses.replace(plain, compile=BACKEND)
    observe(9)
    with torch._dynamo.config.patch(error_on_recompile=True):  # the batch is a variable
        found = [observe(9), observe(6)]
    back = "retrace" if plain.gradient == "checkpoint" else "arrive"
    assert ways == 3 * ["arrive", back]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-9, rtol=1e-9)
        assert mine[1] == theirs[1]
        assert mine[1][0] > 10
        assert (mine[2].forward, mine[2].backward) == (theirs[2].forward, theirs[2].backward)


# as many as features, as numbers that the code is told, as steps
@pytest.mark.parametrize("first", [3, 7, None])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_no_number_of_samples_makes_code_for_itself_alone(gradient, first, monkeypatch):
    torch.manual_seed(0)
    ways = looped(monkeypatch)
    solver = Solver(rtol=1e-3, atol=1e-3, gradient=gradient)
    flow, x = cnf.ffjord(3, hidden=(4,), solver=solver), torch.randn(30, 3)
    with torch.no_grad():
        for parameter in flow.transform.field.parameters():
            parameter.mul_(6)

    def steps(rows):
        with torch.no_grad(), count_nfe() as nfe:
            flow.log_prob(x[:rows])
        return nfe.accepted

    first = first or next(rows for rows in range(2, 30) if steps(rows) == rows)
    flow.transform.solver = dataclasses.replace(solver, compile="eager")
    flow.log_prob(x[:first]).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        flow.log_prob(x).sum().backward()
    assert ways == 2 * ["arrive", "arrive" if gradient == "adjoint" else "retrace"]


def test_few_checkpoints_and_large_states_are_walked(monkeypatch):
    ways = looped(monkeypatch)
    solver = Solver("bosh3", gradient="checkpoint", checkpoints=4, compile="eager")
    flow, x = cnf.ffjord(2, hidden=(4,), solver=solver), torch.randn(5, 2)
    flow.log_prob(x).sum().backward()
    assert ways == []
    monkeypatch.setattr(compiled, "LARGE", 14)
    flow.transform.solver = dataclasses.replace(solver, checkpoints=None)
    flow.log_prob(x).sum().backward()
    assert ways == []


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_field_whose_parameters_cannot_be_swapped_is_walked_back(gradient, monkeypatch):
    class Listed(nn.Module):
        """Reaches its parameters by another way than their names."""

        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(2, 2)) for _ in range(2))
            self.all = [self.a, self.b]

        def forward(self, t, x, context=None):
            for weight in self.all:
                x = torch.tanh(x @ weight)
            return x

    torch.manual_seed(0)
    solver = Solver("bosh3", rtol=1e-3, atol=1e-3, gradient=gradient)
    flow, x = cnf.Continuous(Listed(), solver=solver), torch.randn(5, 2)
    request = Request(log_det=False)

    def observe(flow):
        parameters = list(flow.parameters())
        return torch.autograd.grad(flow.inverse(x, request=request).value.sum(), parameters)

    wanted = observe(flow)
    ways = looped(monkeypatch)
    flow.solver = dataclasses.replace(solver, compile=BACKEND)
    with pytest.warns(SolverWarning, match="slower: .* by their names"):
        torch.testing.assert_close(observe(flow), wanted)
    torch.testing.assert_close(observe(flow), wanted)
    back = "retrace" if gradient == "checkpoint" else "arrive"
    assert ways == ["arrive", f"no {back}", "arrive"]
    # and fields of another kind do as before
    observe(cnf.Continuous(TimeMLP(2, (4,)), solver=flow.solver))
    assert ways[-1] == back


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_way_back_that_fails_is_told_as_steps_that_are_walked(gradient):
    def rhs(t, state, scale=None):
        # differentiated where it is zero, a root gives infinity times zero
        return (scale * torch.sqrt((t - 0.5).clamp_min(0) * state[0]),)

    told = []
    for compile in (False, BACKEND):
        scale = torch.ones((), requires_grad=True)
        at = lambda numbers: 2 * (lambda t, state: rhs(t, state, *numbers),)  # noqa: E731
        solver = Solver("bosh3", rtol=1e-3, atol=1e-3, gradient=gradient, compile=compile)
        (y,), _ = integrate(at([scale])[0], (torch.ones(3, 2),), END, solver, [scale], swap=at)
        with pytest.raises(NonFiniteState) as caught:
            y[-1].sum().backward()
        told.append((caught.value.what, caught.value.time, caught.value.step))
    assert told[0] == told[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_makes_a_loop(monkeypatch):
    ways = looped(monkeypatch)
    state = (torch.randn(3000, 2), torch.zeros(3000))
    rhs = lambda t, parts: (torch.tanh(parts[0]) * t, parts[0].sum(-1))  # noqa: E731
    plain = Solver("bosh3", rtol=1e-4, atol=1e-4, norm="batch")
    for again, rows in enumerate((5, 3, 3000)):
        start = tuple(part[:rows] for part in state)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=again > 0):
            wanted, stats = integrate(rhs, start, END, plain)
            found, counted = integrate(rhs, start, END, dataclasses.replace(plain, compile=True))
        torch.testing.assert_close(found, wanted)
        assert (counted.accepted, counted.rejected) == (stats.accepted, stats.rejected)
    assert ways == 3 * ["arrive"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_inductor_goes_back_in_a_loop(gradient, monkeypatch):
    def given(numbers):
        (weight,) = numbers
        rhs = lambda t, state: (torch.tanh(state[0] @ weight) * t,)  # noqa: E731
        return rhs, rhs

    ways = looped(monkeypatch)
    found = []
    for compile in (False, True):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 2, generator=generator, requires_grad=True) for n in (5, 2))
        solver = Solver("bosh3", rtol=1e-4, atol=1e-4, gradient=gradient, compile=compile)
        (y,), _ = integrate(given([weight])[0], (x,), END, solver, [weight], swap=given)
        y[-1].square().sum().backward()
        found.append([y.detach(), x.grad, weight.grad])
    assert ways == ["arrive", "arrive" if gradient == "adjoint" else "retrace"]
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


def test_without_a_compiler_steps_are_walked(monkeypatch):
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    compiled.code.cache_clear()
    ways = looped(monkeypatch)
    rhs, state = (lambda t, parts: (-t * parts[0],)), (torch.ones(3, 2),)
    with torch.no_grad(), pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        found, _ = integrate(rhs, state, END, Solver("bosh3", compile=True))
    compiled.code.cache_clear()
    torch.testing.assert_close(found, integrate(rhs, state, END, Solver("bosh3"))[0])
    assert ways == []


FAILURES = {
    "velocity": (1.0, lambda t, x: torch.where(t > 0.5, torch.nan, -x), {}, NonFiniteState),
    "stiff": (1.0, lambda t, x: 1e7 * (torch.cos(t) - x), {"max_steps": 50}, TooManySteps),
    "pole": (1.0, lambda t, x: x**2 + 9, {}, StepUnderflow),
    "nowhere": (1.0, lambda t, x: torch.nan * x, {}, NonFiniteState),
    "state": (torch.nan, lambda t, x: -x, {}, NonFiniteState),
}


def assert_told_as_walked(failure):
    """That compiled steps name a failure, its time and its step as plain ones do."""
    start, velocity, options, error = FAILURES[failure]
    state, plain = (torch.full((3, 2), start),), Solver("bosh3", **options)
    told = []
    for solver in (plain, dataclasses.replace(plain, compile=BACKEND)):
        with torch.no_grad(), pytest.raises(error) as caught:
            integrate(lambda t, parts: (velocity(t, parts[0]),), state, END, solver)
        told.append((caught.value.what, caught.value.time, caught.value.step))
    assert told[0] == told[1]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_loop_that_fails_is_told_as_steps_that_are_walked(failure):
    assert_told_as_walked(failure)


def test_what_makes_no_loop_is_compiled_step_by_step(monkeypatch):
    class Counting(nn.Module):
        """Writes into a buffer, which the body of a loop must not."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, t, x, context=None):
            self.calls += 1
            return torch.tanh(x) * t

    solver = Solver("bosh3", rtol=1e-2, atol=1e-2, compile=BACKEND)
    flow, x = cnf.Continuous(Counting(), solver=solver), torch.randn(4, 2)
    ways = looped(monkeypatch)
    request = Request(log_det=False)
    with torch.no_grad():
        with pytest.warns(SolverWarning, match="one by one, which is slower: .*Mutating"):
            found = [flow(x, request=request).value]
        found += [flow(x, request=request).value for _ in range(2)]
        flow.solver = dataclasses.replace(solver, compile=False)
        wanted = flow(x, request=request).value
    assert ways == ["no arrive"]  # and not tried again
    assert float(flow.field.calls) > 40
    for value in found:
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    ("velocity", "error"),
    [
        (lambda t, state: (torch.where(t > 0.5, torch.nan, -state[0]),), NonFiniteState),
        (lambda t, state: (1e7 * (torch.cos(t) - state[0]),), TooManySteps),
    ],
    ids=["nan", "stiff"],
)
def test_failures_keep_their_names(velocity, error):
    solver = Solver("bosh3", max_steps=200, compile=BACKEND)
    with pytest.raises(error, match="t = "):
        integrate(velocity, (torch.ones(3, 2),), END, solver)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_gradients_that_would_be_lost_are_refused_every_time(gradient):
    solver = Solver("heun2", step_size=0.5, gradient=gradient, compile=BACKEND)
    weight, other = (torch.ones(2, requires_grad=True) for _ in range(2))

    def differentiate(weight, parameters):
        start = (torch.ones(3, 2, requires_grad=True),)
        (y,), _ = integrate(lambda t, state: (weight * state[0],), start, END, solver, parameters)
        y.sum().backward()

    differentiate(weight.detach(), ())
    differentiate(weight, (weight, other))
    for parameters in ((), (other,), (other, other.exp())):
        for _ in range(2):  # also where the code was compiled before
            with pytest.raises(UntrackedTensor):
                differentiate(weight, parameters)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (lambda x: x[:1], ValueError, "shapes of the state"),
        (lambda x: x.double(), TypeError, "state's dtype"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_velocities_are_told_every_time(wrong, error, told):
    solver = Solver("heun2", step_size=0.5, compile=BACKEND)
    for _ in range(2):
        with pytest.raises(error, match=told):
            integrate(lambda t, state: (wrong(state[0]),), (torch.ones(3, 2),), END, solver)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "backprop"},
        {"method": "scipy_solver"},
        {"method": "explicit_adams"},
        {"options": {"step_t": [0.5]}},
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused(options):
    with pytest.raises(ValueError, match="compile is for Runge-Kutta"):
        Solver(compile=True, **options)


class Own(nn.Module):
    """A field of a user's, which knows nothing of tangents."""

    def __init__(self, opaque=False):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.opaque = opaque
        self.speed = 1.0

    def forward(self, t, x, context=None):
        if self.opaque:
            torch._dynamo.graph_break()
        return torch.tanh(self.layer(x)) * t * self.speed


@pytest.mark.parametrize(
    ("solver", "backend", "divergence", "costs"),
    [
        (Solver("midpoint", step_size=0.5, gradient="checkpoint"), BACKEND, cnf.Exact(), []),
        (Solver("bosh3", gradient="checkpoint"), BACKEND, cnf.Hutchinson(probes=2), []),
        (Solver("bosh3"), "eager", cnf.Exact(), [cnf.DirectionalDerivative()]),
    ],
)
def test_any_field_may_be_compiled(solver, backend, divergence, costs, monkeypatch):
    torch.manual_seed(0)
    solver = dataclasses.replace(solver, rtol=1e-3, atol=1e-3)
    flow = cnf.Continuous(Own(), solver=solver, divergence=divergence).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    ways = looped(monkeypatch)

    def observe(rows=5):
        flow.zero_grad()
        at = x[:rows].clone().requires_grad_()
        request = Request(generator=torch.Generator().manual_seed(0), costs=costs)
        value, log_det, found = flow(at, request=request)
        (value.square().sum() + log_det.sum() + sum(map(torch.sum, found.values()))).backward()
        return [value.detach(), log_det.detach(), at.grad, *[p.grad for p in flow.parameters()]]

    wanted = [observe(), observe(3)]
    flow.solver = dataclasses.replace(solver, compile=backend)
    found = [observe()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found.append(observe(3))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    back = "retrace" if solver.gradient == "checkpoint" else "arrive"
    assert ways == 2 * (["arrive", back] if solver.method == "bosh3" else [back])


def test_a_field_that_cannot_be_followed_is_named():
    flow = cnf.Continuous(Own(opaque=True), solver=Solver("euler", compile=BACKEND))
    with pytest.raises(CompilationError, match=r"Solver\(compile=False\)"):
        flow(torch.ones(4, 2))


def test_a_number_that_changes_is_compiled_anew():
    field, solver = Own(), Solver("midpoint", step_size=0.5, compile=BACKEND)
    flow, x = cnf.Continuous(field, solver=solver), torch.randn(4, 2)
    with torch.no_grad():
        for field.speed in (1.0, 2.0, -0.5):
            flow.solver = dataclasses.replace(solver, compile=False)
            wanted = flow(x).value
            flow.solver = solver
            torch.testing.assert_close(flow(x).value, wanted)


def test_the_code_is_made_once():
    assert compiled.code(BACKEND) is compiled.code(BACKEND)


@pytest.mark.parametrize(
    ("compile", "backend", "mode"),
    [
        (True, "inductor", None),
        ("reduce-overhead", "inductor", "reduce-overhead"),
        (BACKEND, BACKEND, None),
    ],
)
def test_modes_and_backends_are_told_apart(compile, backend, mode):
    solver = Solver(compile=compile)
    assert (solver.backend, solver.mode) == (backend, mode)


def test_a_flow_hands_its_mode_to_its_steps():
    flow = cnf.ffjord(2, hidden=(8,)).compile(mode="reduce-overhead")
    assert flow.transform.solver.mode == "reduce-overhead"
    assert flow.compile(backend=BACKEND).transform.solver.backend == BACKEND


def test_a_field_by_columns_takes_a_context_that_is_broadcast():
    field = TimeMLP(2, (8,), context_features=3).double()
    t, x = torch.tensor(0.3).double(), torch.randn(4, 5, 2).double()
    run = compiling.compiled(field, backend=BACKEND)
    with torch.no_grad():
        for shape in ((4, 5, 3), (5, 3), (3,)):
            context = torch.randn(shape).double()
            torch.testing.assert_close(run(t, x, context), field(t, x, context))


def test_a_field_by_columns_takes_times_that_are_broadcast():
    field = TimeMLP(2, (8,), conditioning="concat").double()
    t, x = torch.rand(4, 1).double(), torch.randn(4, 5, 2).double()
    run = compiling.compiled(field, backend=BACKEND)
    with torch.no_grad():
        torch.testing.assert_close(run(t, x), field(t, x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [True, "reduce-overhead"])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_on_a_gpu(gradient, compile):
    torch.manual_seed(0)
    solver = Solver(rtol=1e-4, atol=1e-4, gradient=gradient)
    flow = cnf.ffjord(2, hidden=(16,), solver=solver).double().cuda()
    batches = torch.randn(4, 50, 2, dtype=torch.float64, device="cuda")

    def observe():
        scores, grads = [], []
        for x in batches:  # the first calls compile and capture, the others replay
            flow.zero_grad()
            scores.append(flow.log_prob(x))
            scores[-1].sum().backward()
            grads.append([parameter.grad.clone() for parameter in flow.parameters()])
        with torch.no_grad():
            return scores, grads, [flow.decode(z) for z in batches]

    wanted = observe()
    flow.transform.solver = dataclasses.replace(solver, compile=compile)
    torch.testing.assert_close(observe(), wanted, atol=1e-9, rtol=1e-9)
