from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cnf
from cnf.nets import Guided, OptionalContext, TimeMLP
from cnf.objectives import Batch, FlowMatching, MaximumLikelihood, guided


class Push(nn.Module):
    """Moves every point by the first context feature; one more feature says that it is missing."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, t, x, context=None):
        self.seen.append(context)
        return self.gain * context[..., :1].expand(x.shape) + 0 * t.unsqueeze(-1)


def flow_of(field, features=1):
    return cnf.Flow(
        cnf.Continuous(field),
        cnf.Normal(features),
        context_features=1,
        encoder=OptionalContext(),
    )


def test_missing_contexts_are_filled_and_flagged():
    context = torch.tensor([[1.0, 2.0], [math.nan, 3.0]], requires_grad=True)
    seen = OptionalContext()(context)
    assert seen.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    seen.sum().backward()
    assert context.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_a_guided_flow_samples_and_scores_the_exaggerated_context():
    flow = flow_of(Push())
    at = torch.tensor([0.5])
    stronger = guided(flow, 3.0)
    x = torch.linspace(-2, 4, 7).unsqueeze(-1)
    expected = cnf.Normal(1).log_prob(x - 1.5)
    torch.testing.assert_close(stronger.log_prob(x, at), expected, rtol=1e-4, atol=1e-4)
    first, second = (
        one.sample((50,), at, generator=torch.Generator().manual_seed(0))
        for one in (flow, stronger)
    )
    torch.testing.assert_close(second - first, torch.ones(50, 1), rtol=0, atol=1e-4)


def test_a_field_that_couples_samples_is_refused_guided_as_it_is_alone():
    class Mean(Push):
        def forward(self, t, x, context=None):
            return super().forward(t, x, context) + x.mean(0)

    flow, at = flow_of(Mean()), torch.tensor([0.5])
    for one in (flow, guided(flow, 2.0)):
        with pytest.raises(ValueError, match="depends on sample 0"):
            one.log_prob(torch.randn(5, 1), at)


def test_weights_one_and_zero_are_the_flow_with_and_without_its_context():
    torch.manual_seed(0)
    flow = flow_of(TimeMLP(2, (8,), context_features=2), 2)
    x, at = torch.randn(5, 2), torch.tensor([0.7])
    torch.testing.assert_close(
        guided(flow, 1.0).log_prob(x, at), flow.log_prob(x, at), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        guided(flow, 0.0).log_prob(x, at),
        flow.log_prob(x, torch.tensor([math.nan])),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("make", [FlowMatching, MaximumLikelihood])
@pytest.mark.parametrize(("given", "fraction"), [(0.25, 0.25), (None, 0.1), (0.0, 0.0)])
def test_contexts_are_dropped_as_often_as_asked(make, given, fraction):
    field = Push()
    objective = make(flow_of(field), drop_context=given)
    context = torch.full((4000, 1), 2.0)
    loss = objective(Batch(torch.zeros(4000, 1), context), generator=torch.Generator())
    seen = field.seen[-1].reshape(-1, 2)
    assert seen[:, 1].mean().item() == pytest.approx(fraction, abs=0.03)
    assert torch.equal(seen[:, 0], 2 * (1 - seen[:, 1]))
    loss.total.backward()
    assert field.gain.grad.isfinite()


@pytest.mark.parametrize("name", ["ffjord", "maf"])
def test_models_by_name_take_missing_contexts(name, tmp_path):
    torch.manual_seed(0)
    options = {"solver": cnf.Solver("rk4", step_size=0.25)} if name == "ffjord" else {}
    flow = cnf.models[name].build(2, context_features=3, optional_context=True, **options)
    assert flow.optional_context
    assert flow.context_features == 3
    context = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)) + 5
    context[::7] = math.nan
    history = cnf.fit(flow, (torch.randn(60, 2), context), steps=3, batch_size=30)
    assert history.skipped == 0
    whole = context[~context.isnan().any(-1)]
    torch.testing.assert_close(flow.context_scaling.loc, whole.mean(0), atol=1.0, rtol=0)
    x = torch.randn(5, 2)
    scores = flow.log_prob(x)
    assert torch.equal(scores, flow.log_prob(x, torch.full((3,), math.nan)))
    assert not torch.equal(scores, flow.log_prob(x, context[1]))
    assert flow.sample((4,)).shape == (4, 2)
    flow.save(tmp_path)
    loaded = cnf.load(tmp_path)
    assert torch.equal(loaded.log_prob(x), scores)
    assert loaded.recipe.arguments["optional_context"]


def test_guidance_by_name():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (2000, 1), generator=generator).float()
    x = 2 * side - 1 + 0.5 * torch.randn(2000, 1, generator=generator)
    solver = cnf.Solver("rk4", step_size=0.125)
    flow = cnf.ffjord(1, hidden=(16, 16), context_features=1, optional_context=True, solver=solver)
    cnf.fit(flow, (x, side), objective="flow-matching", steps=400, batch_size=128)
    means = [
        one.sample((2000,), torch.ones(1), generator=generator).mean().item()
        for one in (guided(flow, 0.0), flow, guided(flow, 3.0))
    ]
    assert means[0] == pytest.approx(0.0, abs=0.2)
    assert means[1] == pytest.approx(1.0, abs=0.1)
    assert means[2] > means[1] + 0.2


def test_what_cannot_do_without_its_context_is_refused():
    plain = cnf.ffjord(2, hidden=(8,), context_features=1)
    for make in (FlowMatching, MaximumLikelihood):
        with pytest.raises(ValueError, match=r"encoder=cnf.nets.OptionalContext\(\)"):
            make(plain, drop_context=0.1)
    with pytest.raises(ValueError, match="optional_context=True"):
        guided(cnf.ffjord(2, hidden=(8,)), 2.0)
    with pytest.raises(ValueError, match="pass context_features="):
        cnf.ffjord(2, optional_context=True)
    with pytest.raises(ValueError, match="missing or infinite"):
        cnf.fit(plain, (torch.zeros(50, 2), torch.full((50, 1), math.nan)), steps=1)
    with pytest.raises(ValueError, match=r"drop_context must lie in \[0, 1\)"):
        FlowMatching(plain, drop_context=1.0)
    with pytest.raises(ValueError, match="a guided field needs the context"):
        Guided(Push(), torch.zeros(2), 1.0)(torch.tensor(0.0), torch.zeros(1))
