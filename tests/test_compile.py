"""Compiled flows give what eager ones do: every member traced, two through Inductor.

The steps of continuous flows have their own tests, one of them through Inductor, too.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import cnf
from cnf import compiling
from cnf.distributions import Normal
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
@pytest.mark.parametrize("name", ["realnvp", "nsf"])
def test_inductor(name):
    build = cnf.models[name].build
    member = Member(name, lambda solver: build(2, hidden=(8,), layers=2), event=(2,))
    check(member, "inductor")


def test_compiled_flow_can_be_copied_and_saved(tmp_path):
    flow = cnf.realnvp(2, layers=2)
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
        inductor = torch._inductor.config.cpp.enable_floating_point_contract_flag
        dynamo = torch._dynamo.config
        return dynamo.trace_autograd_ops, dynamo.specialize_float, inductor

    before, within = state(), []
    run = compiling.compiled(lambda x: x + 1, backend="aot_eager", constants=True)
    with compiling.settings(constants=True):
        within.append(state())
        run(torch.ones(3))
    with pytest.raises(RuntimeError), compiling.settings():
        torch.ones(3) @ torch.ones(2)
    run(torch.ones(3))
    assert within == [(True, True, "fast")]
    assert state() == before


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
