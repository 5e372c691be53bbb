from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import cnf
from cnf.flow import Evaluation
from cnf.objectives import OBJECTIVES, Batch, MaximumLikelihood, build_objective
from cnf.registry import UnknownNameError


@dataclasses.dataclass(frozen=True)
class Named:
    """As much of a cost as an objective sees."""

    name: str


class Recording(nn.Module):
    """A density with log p = −x · scale, which keeps the requests that it gets."""

    optional_context = False
    event_shape = ()

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.requests = []

    def evaluate(self, x, context=None, request=None):
        self.requests.append(request)
        costs = {cost.name: x.square() for cost in request.costs if cost.name != "absent"}
        return Evaluation(-x * self.scale, None, x, costs)


X = torch.tensor([1.0, 2.0, 3.0])


def test_likelihood_is_the_mean_negative_log_density():
    loss = MaximumLikelihood(Recording())(Batch(X))
    assert loss.total.item() == pytest.approx(4.0)
    assert loss.terms.keys() == {"nll"}
    assert loss.terms["nll"].item() == pytest.approx(4.0)
    assert not loss.terms["nll"].requires_grad
    assert loss.total.requires_grad


def test_weights_are_normalised():
    weight = torch.tensor([3.0, 0.0, 1.0])
    loss = MaximumLikelihood(Recording())(Batch(X, weight=weight))
    assert loss.total.item() == pytest.approx((3 * 2 + 6) / 4)


def test_costs_are_weighted_by_number_or_schedule():
    costs = {Named("fixed"): 0.5, Named("rising"): lambda progress: progress}
    loss = MaximumLikelihood(Recording(), costs=costs)(Batch(X), progress=0.25)
    square = (1 + 4 + 9) / 3
    assert loss.total.item() == pytest.approx(4.0 + 0.75 * square)
    assert loss.terms["rising"].item() == pytest.approx(square)


def test_a_cost_without_a_path_costs_nothing():
    loss = MaximumLikelihood(Recording(), costs={Named("absent"): 1.0})(Batch(X))
    assert loss.terms.keys() == {"nll"}


def test_the_request_says_what_the_objective_wants():
    flow, divergence, generator = Recording(), object(), torch.Generator()
    cost = Named("kinetic")
    MaximumLikelihood(flow, divergence=divergence, costs={cost: 1.0})(Batch(X), generator=generator)
    (request,) = flow.requests
    assert request.divergence is divergence
    assert request.costs == (cost,)
    assert request.generator is generator
    assert request.clock == 1.0


def test_end_times_are_uniform_and_repeatable():
    flow = Recording()
    objective = MaximumLikelihood(flow, end_time_spread=0.5)
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            objective(Batch(X), generator=generator)
    clocks = torch.tensor([request.clock for request in flow.requests])
    assert torch.equal(clocks[:200], clocks[200:])
    assert clocks.min() >= 0.5
    assert clocks.max() <= 1.5
    assert clocks.mean().item() == pytest.approx(1.0, abs=0.06)
    assert clocks.std().item() == pytest.approx(1 / 12**0.5, abs=0.03)


@pytest.mark.parametrize("spread", [-0.1, 1.0])
def test_an_impossible_end_time_is_refused(spread):
    with pytest.raises(ValueError, match="end_time_spread must lie in"):
        MaximumLikelihood(Recording(), end_time_spread=spread)


@pytest.mark.parametrize("costs", [{"kinetic_energy": 0.1}, [Named("kinetic")], "kinetic_energy"])
def test_costs_that_are_no_records_with_weights_are_refused(costs):
    with pytest.raises(TypeError, match="records to their weights"):
        MaximumLikelihood(Recording(), costs=costs)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_rewards_a_cost_is_refused(weight):
    with pytest.raises(ValueError, match="weight of kinetic must be zero or positive"):
        MaximumLikelihood(Recording(), costs={Named("kinetic"): weight})
    falling = MaximumLikelihood(Recording(), costs={Named("kinetic"): lambda _: weight})
    with pytest.raises(ValueError, match="weight of kinetic must be zero or positive"):
        falling(Batch(X))


def test_objectives_have_names():
    assert isinstance(build_objective("likelihood", Recording()), MaximumLikelihood)
    assert "likelihood" in OBJECTIVES
    with pytest.raises(UnknownNameError, match="Did you mean 'likelihood'"):
        build_objective("likelyhood", Recording())


def test_objectives_bring_their_learning_rate_and_share():
    continuous, discrete = cnf.ffjord(2, hidden=(8,)), cnf.realnvp(2)
    assert MaximumLikelihood(continuous).lr == 1e-2
    assert MaximumLikelihood(discrete).lr == 5e-3
    matching = build_objective("flow-matching", continuous)
    assert (matching.lr, matching.share, matching.optimizer) == (3e-2, 3.0, "muon")
    assert MaximumLikelihood(continuous).optimizer == "adamw"
    x = torch.randn(100, 2)
    history = cnf.fit(
        continuous, x, objective=("flow-matching", "likelihood"), steps=9, batch_size=32
    )
    assert history.stages == [("flow-matching", 0), ("likelihood", 7)]
