"""Compiled flows give what eager ones do: traced for the families, through Inductor for two."""

from __future__ import annotations

import shutil

import pytest
import torch

import cnf
from tests.registry import Member, models
from tests.test_laws import make, points

# dynamo looks at the gradient of tensors that are no leaves, and torch warns of itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


def check(member: Member, backend: str) -> None:
    flow, x = make(member), points(member, 6)
    parameters = [p for p in flow.parameters() if p.requires_grad]

    def observe():
        log_prob = flow.log_prob(x)
        gradients = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
        samples = flow.sample((5,), generator=torch.Generator().manual_seed(0))
        return [log_prob.detach(), samples, *[g for g in gradients if g is not None]]

    expected = observe()
    flow.compile(backend=backend)
    for found, wanted in zip(observe(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


FAMILIES = ("ffjord, two blocks", "realnvp", "maf", "iaf", "nsf, autoregressive")


@pytest.mark.parametrize(
    "member", [m for m in models(2, 0) if m.name.rpartition(", D")[0] in FAMILIES], ids=str
)
def test_traced(member):
    torch.compiler.reset()
    check(member, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["nsf", "ffjord"])
def test_inductor(name):
    torch.compiler.reset()
    build = cnf.models[name].build
    small = {} if name == "ffjord" else {"layers": 2}
    check(Member(name, lambda solver: build(2, hidden=(8,), **small), event=(2,)), "inductor")


def test_compiled_flow_can_be_copied_and_saved(tmp_path):
    flow = cnf.realnvp(2, layers=2)
    flow.compile(backend="aot_eager").save(tmp_path)
    assert torch.equal(cnf.load(tmp_path).sample((0,)), flow.sample((0,)))
