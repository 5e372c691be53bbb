"""Compiled flows give what eager ones do: every member traced, two through Inductor.

Continuous flows through Inductor are ``test_compiled_flows.py``'s, their steps have tests, too.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cnf
from cnf import compiling
from cnf.bijections import Affine, Softplus
from cnf.distributions import Normal
from cnf.nets import MADE, MLP
from cnf.transforms import (
    Autoregressive,
    BatchNorm,
    Chain,
    Coupling,
    Inverse,
    Transform,
    half_mask,
)
from cnf.transforms.base import Mapped
from tests.registry import TRANSFORMS, Member, image_models, models
from tests.test_laws import contexts, make, points

# the same steps to trace as another member's: a model's own, with a context, twice, another base
TWINS = (
    "affine coupling",
    "affine coupling with context",
    "spline coupling",
    "affine autoregressive",
    "affine autoregressive with context",
    "block autoregressive",
    "block autoregressive with context",
    "inverse autoregressive",
    "channel coupling with context",
    "continuous with context",
    "continuous, fixed grid",
    "ffjord, two blocks, D=2, C=2",
    "ffjord, film and actnorm, D=2, C=2",
    "nice, logistic base, D=2, C=2",
    "nsf, autoregressive, D=2, C=2",
    "ncsf, autoregressive, D=2, C=2",
    "planar, forward, D=2, C=2",
    "rnode, D=2, C=2",
    "ffjord, (1, 4, 4), C=0",
)
MEMBERS = [*TRANSFORMS, *models(2, 2, most=1), *image_models((1, 4, 4), 0, most=1)]

# compiled and eager solves take the same steps: one of one stage shows as much as many
COARSE = cnf.Solver("euler", step_size=1.0)


def flow_of(member: Member) -> cnf.Flow:
    """The member itself, or for a transform the flow of it and a normal base."""
    module: nn.Module = make(member, solver=COARSE)
    if isinstance(module, cnf.Flow):
        return module
    base = Normal(member.latent or member.event)
    return cnf.Flow(
        module, base, event_shape=member.event, context_features=member.context
    ).double()


def check(member: Member, backend: str) -> None:
    torch.compiler.reset()
    flow, x, context = flow_of(member), points(member, 6), contexts(member, 6)
    parameters = [p for p in flow.parameters() if p.requires_grad]

    def observe():
        with torch.no_grad():  # compiled by columns
            scores = flow.log_prob(x, context)
        log_prob = flow.log_prob(x, context)
        gradients = [None] * len(parameters)
        if log_prob.requires_grad:  # a permutation has nothing to train
            gradients = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
        shape = (5,) if context is None else ()
        samples = flow.sample(shape, context, generator=torch.Generator().manual_seed(0))
        return [scores, log_prob.detach(), samples, *[g for g in gradients if g is not None]]

    expected = observe()
    flow.compile(backend=backend)
    for found, wanted in zip(observe(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.name not in TWINS], ids=str)
def test_traced(member):
    check(member, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_differentiates_determinants():
    """It takes the factors of a transposed matrix for its transpose's: none may reach it."""
    torch.compiler.reset()
    flow = cnf.residual_flow(2, hidden=(4,), layers=1).double()
    x = torch.randn(5, 2, dtype=torch.float64)

    def observe():
        return torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))

    wanted = observe()
    flow.compile()
    for found, gradient in zip(observe(), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["realnvp", "nsf"])
def test_inductor(name):
    build = cnf.models[name].build
    member = Member(name, lambda solver: build(2, hidden=(8,), layers=2), event=(2,))
    check(member, "inductor")


@pytest.mark.parametrize("name", ["realnvp", "ffjord"])
def test_compiled_flow_can_be_copied_and_saved(name, tmp_path):
    flow = cnf.models[name].build(2, hidden=(4,))
    flow.compile(backend="aot_eager").save(tmp_path)
    assert torch.equal(cnf.load(tmp_path).sample((0,)), flow.sample((0,)))


def test_without_a_compiler_a_flow_runs_as_it_is_and_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    flow, x = cnf.realnvp(2, layers=2), torch.ones(3, 2)
    plain = flow.log_prob(x)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        flow.compile()
    assert torch.equal(flow.log_prob(x), plain)


def test_what_compilers_are_told_ends_with_the_call():
    def state():
        cached = torch._functorch.config.autograd_cache_allow_custom_autograd_functions
        dynamo = torch._dynamo.config
        return dynamo.trace_autograd_ops, dynamo.specialize_float, cached

    before, within = state(), []
    run = compiling.compiled(lambda x: x + 1, backend="aot_eager", constants=True)
    with compiling.settings(constants=True):
        within.append(state())
        run(torch.ones(3))
    with pytest.raises(RuntimeError), compiling.settings():
        torch.ones(3) @ torch.ones(2)
    run(torch.ones(3))
    assert within == [(True, True, True)]
    assert state() == before


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_what_inductor_is_told_goes_with_the_function(mode, monkeypatch):
    given = {}
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.update(options))
    monkeypatch.setattr("inspect.signature", lambda function: inspect.Signature())
    compiling.compiled(lambda x: x, mode=mode)
    options = given["options"]
    assert options["cpp.enable_floating_point_contract_flag"] == "fast"
    assert options.get("triton.cudagraphs", False) == (mode == "reduce-overhead")
    assert "mode" not in given  # torch takes one or the other
    compiling.compiled(lambda x: x, backend="aot_eager")
    assert [*given["options"]] == ["guard_filter_fn"]


def test_a_compiler_is_told_once_for_each_kind_of_call(monkeypatch):
    torch.compiler.reset()
    told, settings = [], compiling.settings

    def counting(constants):
        told.append(constants)
        return settings(constants)

    def function(x):
        return (2 * x.sin()).sum(0)

    monkeypatch.setattr(compiling, "settings", counting)
    run = compiling.compiled(function, backend="aot_eager")
    x = torch.randn(3, 3)
    kinds = [x, x[:2], x.double(), x.clone().requires_grad_()]
    for count, (value, grad) in enumerate(itertools.product(kinds, [True, False]), 1):
        with torch.set_grad_enabled(grad):
            for again in (value, value.detach().clone().requires_grad_(value.requires_grad)):
                torch.testing.assert_close(run(again), function(again))
                assert len(told) == count


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_exponents_are_exact_in_compiled_code(dtype):
    sizes = torch.logspace(-30, 1.5, 40, dtype=dtype)
    x = torch.cat([sizes, -sizes])
    found = compiling.compiled(compiling.expm1)(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, torch.expm1(x), rtol=16 * eps, atol=0)
    found = compiling.compiled(Softplus().inverse)(sizes)
    torch.testing.assert_close(found, Softplus().inverse(sizes), rtol=16 * eps, atol=16 * eps)


def test_however_points_lie_they_take_the_same_code():
    torch.compiler.reset()
    flow, x = flow_of_many_kinds(), torch.randn(6, 2)
    flow.eval().compile(backend="aot_eager").log_prob(x)
    before = counters["stats"]["unique_graphs"]
    for lying in (x.t().contiguous().t(), x[:1].expand(6, 2), torch.randn(12, 4)[::2, 1:3]):
        found, wanted = flow.log_prob(lying), copy.deepcopy(flow).log_prob(lying)
        torch.testing.assert_close(found, wanted)
    assert counters["stats"]["unique_graphs"] == before


def test_a_flow_is_compiled_for_many_kinds_of_calls():
    torch.compiler.reset()
    flow = flow_of_many_kinds().eval()
    flow.compile(backend="aot_eager", dynamic=False)
    for count in range(2, 14):
        flow.log_prob(torch.randn(count, 2))
    before = counters["stats"]["unique_graphs"]
    flow.log_prob(torch.randn(20, 2))
    assert counters["stats"]["unique_graphs"] > before


class Moved(Transform):
    """x = z + by, with a plain number that compiled code holds as a constant."""

    def __init__(self):
        super().__init__()
        self.by = 1.0

    def forward(self, z, context=None, request=None):
        return Mapped(z + self.by, z.new_zeros(z.shape[:-1]), {})

    def inverse(self, x, context=None, request=None):
        return Mapped(x - self.by, x.new_zeros(x.shape[:-1]), {})


def flow_of_many_kinds():
    couplings = [Coupling(Affine(), MLP(1, 2, zero_last=False), half_mask(2)) for _ in range(2)]
    return cnf.Flow(cnf.Chain([Moved(), couplings[0], BatchNorm((2,)), couplings[1]]), Normal(2))


def move(flow):
    flow.transform[0].by = 3.0


def bound(flow):
    flow.transform[1].scalar_map = Affine(bound=0.1)


def exchange(flow):
    flow.transform[3].conditioner.activation = nn.Tanh()


def train(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)


def load(flow):
    flow.load_state_dict(flow_of_many_kinds().state_dict())


def test_only_what_can_be_helped_is_said():
    compiling.compiled(lambda x: x, native=True)
    logger = logging.getLogger("torch._inductor.ir")
    record = logging.makeLogRecord({"msg": "%s is missing a c-shim implementation"})
    assert not logger.filter(record)
    assert logger.filter(logging.makeLogRecord({"msg": "anything else"}))


@pytest.mark.parametrize("change", [move, bound, exchange, train, load, nn.Module.train])
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_code_sees_what_changes_in_a_flow(change, grad):
    torch.compiler.reset()
    torch.manual_seed(0)
    flow, x = flow_of_many_kinds().eval(), torch.randn(6, 2)

    def scores():
        plain = copy.deepcopy(flow)  # before a batch moves the running mean
        found, expected = flow.log_prob(x), plain.log_prob(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(flow.state_dict(), plain.state_dict())
        return found

    flow.compile(backend="aot_eager")
    with torch.set_grad_enabled(grad):
        before = scores()
        change(flow)
        assert not torch.allclose(scores(), before, atol=1e-3)


@pytest.mark.skipif(not hasattr(torch._dynamo.types, "GuardFilterEntry"), reason="torch < 2.7")
def test_guards_are_dropped_of_this_packages_modules_alone(monkeypatch):
    torch.compiler.reset()
    kept, dropped, changeable = [], [], compiling._changeable

    def watching(guards):
        stay = changeable(guards)
        for guard, stays in zip(guards, stay, strict=True):
            (kept if stays else dropped).append(guard.name)
        return stay

    monkeypatch.setattr(compiling, "_changeable", watching)
    flow = flow_of_many_kinds().compile(backend="aot_eager")
    flow.log_prob(torch.randn(6, 2))
    assert dropped
    assert all(name.startswith("G['__import_cnf_dot_") for name in dropped)
    for seen in (".by", ".training", ".scalar_map", "__import_tests_dot_test_compile']"):
        assert any(name.endswith(seen) for name in kept)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3), (3,)])
@pytest.mark.parametrize(
    ("build", "options"),
    [(cnf.maf, {"layers": 2}), (cnf.realnvp, {"layers": 2}), (cnf.ffjord, {"solver": COARSE})],
    ids=["maf", "realnvp", "ffjord"],
)
def test_code_by_columns_takes_any_batch(build, options, shape):
    torch.compiler.reset()
    torch.manual_seed(0)
    flow = build(3, context_features=2, hidden=(8, 8), **options).double()
    x, context = torch.randn(shape).double(), torch.randn(2).double()
    with torch.no_grad():
        for parameter in flow.parameters():  # away from the identity
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = flow.log_prob(x, context), flow.encode(x, context)
        flow.compile(backend="aot_eager")
        found = flow.log_prob(x, context), flow.encode(x, context)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "unrolled"),
    [({}, False), ({"passes": 2}, True), ({"adjacency": torch.ones(12, 12).tril(-6)}, True)],
    ids=["features", "passes", "graph"],
)
def test_many_steps_are_left_uncompiled(kwargs, unrolled, turned):
    torch.compiler.reset()
    torch.manual_seed(0)
    part = Autoregressive(Affine(), MADE(12, 2, hidden=(16,), zero_last=False, **kwargs))
    flow = cnf.Flow(Chain([Inverse(part) if turned else part]), Normal(12)).double()
    x = torch.randn(6, 12).double()

    def seeded(function):
        torch.manual_seed(0)
        return function((6,))

    def gradients(value):
        return [value.detach(), *torch.autograd.grad(value.square().sum(), [*part.parameters()])]

    directions = [
        lambda: [
            seeded(flow.sample),
            *gradients(seeded(flow.rsample)),
            *gradients(seeded(flow.sample_and_log_prob)[1]),
        ],
        lambda: [*gradients(flow.log_prob(x)), flow.encode(x).detach()],
    ]
    expected = [observe() for observe in directions]
    graphs = torch._dynamo.utils.counters["stats"]
    flow.compile(backend="aot_eager")
    for observe, wanted, forward in zip(directions, expected, [True, False], strict=True):
        graphs.clear()
        torch.testing.assert_close(observe(), wanted, atol=1e-9, rtol=1e-9)
        compiles = unrolled or forward == turned
        assert bool(graphs["unique_graphs"]) == compiles


def test_few_steps_are_told_by_the_transform():
    flow = cnf.maf(5, layers=3, hidden=(8,))
    assert flow.transform.steps == (5, 1)
    assert cnf.iaf(5, layers=3, hidden=(8,)).transform.steps == (1, 5)
    assert cnf.realnvp(5).transform.steps == (1, 1)
    assert cnf.bnaf(5).transform.steps == (5, 1)
    assert Chain([flow.transform, Inverse(flow.transform)]).steps == (5, 5)
