from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cnf
from cnf.nets import Guided, OptionalContext, TimeMLP
from cnf.objectives import Batch, FlowMatching, guided


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


def test_contexts_are_dropped_as_often_as_asked():
    field = Push()
    objective = FlowMatching(flow_of(field), drop_context=0.25)
    context = torch.full((4000, 1), 2.0)
    loss = objective(Batch(torch.zeros(4000, 1), context), generator=torch.Generator())
    seen = field.seen[-1].reshape(-1, 2)
    assert seen[:, 1].mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[:, 0], 2 * (1 - seen[:, 1]))
    loss.total.backward()
    assert field.gain.grad.isfinite()


def test_what_cannot_do_without_its_context_is_refused():
    plain = cnf.ffjord(2, hidden=(8,), context_features=1)
    with pytest.raises(ValueError, match=r"encoder=cnf.nets.OptionalContext\(\)"):
        FlowMatching(plain, drop_context=0.1)
    with pytest.raises(ValueError, match="needs a conditional flow"):
        guided(cnf.ffjord(2, hidden=(8,)), 2.0)
    with pytest.raises(ValueError, match=r"drop_context must lie in \[0, 1\)"):
        FlowMatching(plain, drop_context=1.0)
    with pytest.raises(ValueError, match="a guided field needs the context"):
        Guided(Push(), torch.zeros(2), 1.0)(torch.tensor(0.0), torch.zeros(1))
