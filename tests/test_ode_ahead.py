"""Attempts at steps that are started before it is known what came of others, as on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cnf
from cnf.ode import (
    Solver,
    compiled,
    count_nfe,
    guard,
    integrate,
    stepper,
    traced,
    transfer,
)
from cnf.ode.compiled import AHEAD, CompiledSteps
from cnf.ode.runge_kutta import tableau
from cnf.ode.traced import Spec
from cnf.ode.transfer import Answer, send
from cnf.transforms import Request
from tests.test_ode_compiled import BACKEND, END, FAILURES, assert_told_as_walked


@pytest.fixture
def events(monkeypatch):
    """Ways as on a GPU, and what happened on them: attempts, and looks at what came of them."""
    torch.compiler.reset()
    events: list[str] = []
    code, read, arrive = compiled.code, Answer.read, CompiledSteps.arrive_ahead

    def listening(backend, mode=None):
        made = code(backend, mode)

        def attempting(*arguments):
            events.append("attempt")
            return made.attempt(*arguments)

        return made._replace(attempt=attempting)

    def reading(self):
        events.append("look")
        return read(self)

    def arriving(self, *arguments):
        found = arrive(self, *arguments)
        events.append("failed" if found is None else "arrived")
        return found

    monkeypatch.setattr(compiled, "code", listening)
    monkeypatch.setattr(Answer, "read", reading)
    monkeypatch.setattr(CompiledSteps, "arrive_ahead", arriving)
    monkeypatch.setattr(transfer, "far", lambda tensor: True)
    return events


@pytest.mark.parametrize(
    ("method", "options", "divergence"),
    [
        ("dopri5", {"norm": "batch"}, cnf.Exact()),
        ("bosh3", {"quadrature": False}, cnf.Hutchinson(probes=2)),
    ],
)
def test_attempts_ahead_are_those_that_are_walked(method, options, divergence, events):
    torch.manual_seed(0)
    plain = Solver(method, rtol=1e-4, atol=1e-4, **options)
    flow = cnf.ffjord(3, hidden=(8,), context_features=2, solver=plain, divergence=divergence)
    flow = flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(6)  # so that steps shrink, and some are rejected
    x, context = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)

    def observe(rows):
        request = Request(generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), count_nfe() as nfe:
            log_prob = flow.evaluate(x[:rows], context[:rows], request).log_prob
            z = flow.encode(x[:rows], context[:rows])
        return (log_prob, z), (nfe.accepted, nfe.rejected), nfe.forward

    wanted = [observe(rows) for rows in (9, 6)]
    flow.transform.solver = dataclasses.replace(plain, compile=BACKEND)
    observe(9)
    events.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):  # the batch is a variable
        found = [observe(9), observe(6)]
    assert events.count("arrived") == 4
    assert wanted[0][1][1] > 0
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-11, rtol=1e-11)
        assert mine[1] == theirs[1]
    tried = sum(sum(steps) for _, steps, _ in wanted)
    spent = sum(nfe for *_, nfe in found) - sum(nfe for *_, nfe in wanted)
    in_vain = events.count("attempt") - tried
    assert 0 <= in_vain <= 4
    assert spent >= in_vain  # they count, too
    assert (spent > 0) == (in_vain > 0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {"gradient": "checkpoint", "norm": "batch"}),
        ("bosh3", {"seminorm": False}),
    ],
)
def test_gradients_along_attempts_ahead_are_those_of_walks(method, options, events):
    torch.manual_seed(0)
    plain = Solver(method, rtol=1e-4, atol=1e-4, **options)
    flow = cnf.ffjord(
        3, hidden=(4,), context_features=1, solver=plain, trainable_end_time=True
    ).double()
    x, context = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)

    def observe():
        flow.zero_grad()
        inputs = [part.clone().requires_grad_() for part in (x, context)]
        with count_nfe() as nfe:
            found = flow.evaluate(*inputs, Request(costs=[cnf.KineticEnergy()]))
            (found.log_prob.sum() + found.costs["kinetic_energy"].sum()).backward()
        grads = [part.grad for part in (*inputs, *flow.parameters())]
        return [found.log_prob.detach(), *grads], (nfe.accepted, nfe.rejected)

    wanted = observe()
    flow.transform.solver = dataclasses.replace(plain, compile=BACKEND)
    found = observe()
    assert events.count("arrived") == (1 if plain.gradient == "checkpoint" else 2)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-9, rtol=1e-9)
    assert found[1] == wanted[1]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_told_as_of_steps_that_are_walked(failure, events):
    assert_told_as_walked(failure)
    assert events[-1] == "failed"


@pytest.mark.parametrize("backwards", [False, True])
def test_attempts_are_started_before_the_last_is_known(backwards, events):
    solver = Solver(rtol=1e-5, atol=1e-5, compile=BACKEND)
    times = END.flip(0) if backwards else END
    with torch.no_grad(), count_nfe() as nfe:
        integrate(lambda t, parts: (torch.cos(9 * t) * parts[0],), (torch.ones(3),), times, solver)
    ways = [event for event in events if event != "arrived"]
    assert ways[: AHEAD + 1] == [*AHEAD * ["attempt"], "look"]
    under_way = 0
    for event in ways:
        under_way += 1 if event == "attempt" else -1
        assert 0 <= under_way <= AHEAD
    tried = nfe.accepted + nfe.rejected
    assert ways.count("look") == tried > 5
    # near the end no more are started than are missing
    assert tried <= ways.count("attempt") <= tried + 1


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_training_step_waits_for_its_ways_ends(gradient, events, monkeypatch):
    finite = guard.finite

    def looking(tensors):
        events.append("look")
        return finite(tensors)

    monkeypatch.setattr(guard, "finite", looking)
    flow = cnf.ffjord(2, hidden=(4,), solver=Solver(gradient=gradient, compile="eager"))
    loss, x = cnf.MaximumLikelihood(flow), cnf.Batch(torch.randn(5, 2))
    for _ in range(2):
        events.clear()
        loss(x).total.backward()
    ways = events.count("arrived")
    # at what came of attempts, at the solution and at the gradient
    assert events.count("look") <= events.count("attempt") + 2
    assert events[0] == "attempt"
    assert ways == (2 if gradient == "adjoint" else 1)


def test_steps_back_add_up_one_tensor(events, monkeypatch):
    added, add = [], stepper._sum

    def adding(known, term):
        added.append(term)
        return add(known, term)

    monkeypatch.setattr(stepper, "_sum", adding)
    flow = cnf.ffjord(
        2, hidden=(4,), solver=Solver("bosh3", gradient="checkpoint", compile=BACKEND)
    )
    with count_nfe() as nfe:
        flow.log_prob(torch.randn(5, 2)).sum().backward()
    assert len([*flow.parameters()]) > 3
    assert len(added) == nfe.accepted // 2 - 1 > 0  # half of the steps are those back


@pytest.mark.parametrize("first", [4, 5, 6])
def test_no_number_of_samples_makes_code_for_itself_alone(first, events):
    flow = cnf.ffjord(3, hidden=(4,), solver=Solver(gradient="checkpoint", compile="eager"))
    x = torch.randn(12, 3)
    flow.log_prob(x[:first]).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        flow.log_prob(x).sum().backward()
    assert events.count("arrived") == 2


def test_large_states_are_kept_and_few_checkpoints_are_walked(events, monkeypatch):
    monkeypatch.setattr(compiled, "LARGE", 3)
    solver = Solver("bosh3", gradient="checkpoint", compile="eager")
    flow, x = cnf.ffjord(2, hidden=(4,), solver=solver), torch.randn(5, 2)
    flow.log_prob(x).sum().backward()
    assert events.count("arrived") == 1
    flow.transform.solver = dataclasses.replace(solver, checkpoints=4)
    flow.log_prob(x).sum().backward()
    assert events.count("arrived") == 1


@pytest.mark.parametrize(
    "found",
    [
        [1.0, 0.3, 4.0, 1.0, 0.0, 0.0],  # is there
        [0.5, 1e-7, 4.0, 1.0, 0.0, 0.0],  # the step is too small
        [0.5, 0.3, 90.0, 10.0, 0.0, 0.0],  # there were too many
    ],
)
def test_what_has_ended_is_left_alone(found):
    def rhs(t, state):
        return (t * state[0].sin(),)

    spec = Spec(rhs, 1, ("sample",), tableau("dopri5"))
    numbers = torch.tensor([1.0, 1e-5, 1e-5, 1e-6, 100.0], dtype=torch.float64)
    state, slopes, found = torch.randn(4, 2), torch.randn(4, 2), torch.tensor(found).double()
    after, last, then = traced.attempt(spec, numbers, found, (state,), (slopes,))
    assert torch.equal(after, state.reshape(-1))
    assert torch.equal(last, slopes.reshape(-1))
    assert torch.equal(then[:4], found[:4])
    on = torch.tensor([0.5, 0.3, 4.0, 1.0, 0.0, 0.0]).double()
    moved, _, then = traced.attempt(spec, numbers, on, (state,), (rhs(on[0], (state,))[0],))
    assert not torch.equal(moved, after)
    assert then.tolist()[4:] == [0.5, 0.25]


def test_numbers_there_and_back():
    numbers = [0.25, 1e-9, 7.0]
    assert Answer(send(numbers, torch.float64, torch.device("cpu"))).read() == numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_there_and_back_on_a_gpu():
    numbers = [0.25, 1e-9, 7.0]
    there = send(numbers, torch.float64, torch.device("cuda"))
    answers = [Answer(there * factor) for factor in range(50)]
    assert [answer.read() for answer in answers] == [
        [factor * number for number in numbers] for factor in range(50)
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [True, "reduce-overhead"])
def test_ways_on_a_gpu_are_walked_ahead(compile, monkeypatch):
    ways = []
    arrive = CompiledSteps.arrive_ahead

    def arriving(self, *arguments):
        ways.append(arrive(self, *arguments))
        return ways[-1]

    monkeypatch.setattr(CompiledSteps, "arrive_ahead", arriving)
    flow = cnf.ffjord(2, hidden=(16,), solver=Solver()).double().cuda()
    x = torch.randn(50, 2, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        wanted = flow.log_prob(x)
        flow.transform.solver = Solver(compile=compile)
        for _ in range(3):
            torch.testing.assert_close(flow.log_prob(x), wanted, atol=1e-9, rtol=1e-9)
    assert len(ways) == 3
    assert None not in ways
