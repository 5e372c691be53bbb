from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cnf
from cnf.objectives import (
    OBJECTIVES,
    Batch,
    FlowMatching,
    LateTimes,
    UniformTimes,
    build_objective,
)
from cnf.objectives.flow_matching import LEAST_TIMES
from cnf.transforms import Chain, Continuous, Diagonal, Permutation

MEAN, SPREAD = 1.5, 0.4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class GaussianVelocity(nn.Module):
    """The marginal velocity between N(0, 1) and N(MEAN, SPREAD²) along straight lines."""

    def forward(self, t, x, context=None):
        variance = (1 - t) ** 2 + (SPREAD * t) ** 2
        growth = (SPREAD**2 * t - (1 - t)) / variance
        return MEAN + growth.unsqueeze(-1) * (x - MEAN * t.unsqueeze(-1))


class Polynomial(nn.Module):
    """v = Σ tᵏ (aₖ + bₖ x)."""

    def __init__(self, degree):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(degree)), nn.Parameter(torch.zeros(degree))

    def forward(self, t, x, context=None):
        powers = t.unsqueeze(-1) ** torch.arange(len(self.a))
        return (powers @ self.a).unsqueeze(-1) + (powers @ self.b).unsqueeze(-1) * x


def flow_of(field, features=1, **kwargs):
    return cnf.Flow(Continuous(field, **kwargs), cnf.Normal(features)).double()


def gaussian_data(rows):
    return MEAN + SPREAD * torch.randn(rows, 1, dtype=torch.float64, generator=generator(7))


def log_normal(x):
    return -0.5 * ((x - MEAN) / SPREAD) ** 2 - math.log(SPREAD * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("times", [UniformTimes(), LateTimes(2.0)])
def test_the_closed_form_velocity_has_the_exact_density_and_the_least_loss(times):
    flow = flow_of(GaussianVelocity(), solver=cnf.Solver(rtol=1e-7, atol=1e-7))
    x = torch.linspace(0, 3, 9, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(flow.log_prob(x), log_normal(x).squeeze(-1), rtol=0, atol=1e-5)
    # what no field can explain is the spread of x - z given x_t: 1 + s² - (dσ_t/dt)²
    t = times.quantile((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    sigma = ((1 - t) ** 2 + (SPREAD * t) ** 2).sqrt()
    least = (1 + SPREAD**2 - ((SPREAD**2 * t - (1 - t)) / sigma) ** 2).mean().item()
    objective = FlowMatching(flow, times=times)
    loss = objective(Batch(gaussian_data(50_000)), generator=generator())
    assert loss.total.item() == pytest.approx(least, rel=0.02)
    assert loss.terms["velocity error"].item() == loss.total.item()


@pytest.mark.parametrize("times", ["uniform", "late"])
def test_the_trained_solution_reproduces_the_exact_density(times):
    flow = flow_of(Polynomial(7))
    objective, batch = FlowMatching(flow, times=times), Batch(gaussian_data(80_000))
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(batch, generator=generator()).total
        loss.backward()
        return loss

    optimizer.step(closure)
    x = MEAN + SPREAD * torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        gap = flow.log_prob(x) - log_normal(x).squeeze(-1)
    assert gap.abs().max() < 0.05


def test_a_batch_matches_the_formula_with_clock_and_scaling():
    field = cnf.nets.TimeMLP(2, (8,))
    flow = flow_of(field, 2, end_time=2.0)
    x = 3 + 2 * torch.randn(16, 2, dtype=torch.float64)
    flow.standardize(x)
    loss = FlowMatching(flow, draws=1)(Batch(x), generator=generator(3))
    noise = generator(3)
    z = torch.randn(16, 2, dtype=torch.float64, generator=noise)
    place = torch.randperm(16, generator=noise)
    t = 1 - (1 - (place + torch.rand(16, dtype=torch.float64, generator=noise)) / 16) ** 2
    data = (x - x.mean(0)) / x.std(0, correction=0)
    at = z + t[:, None] * (data - z)
    error = 2 * field(2 * t, at) - (data - z)
    torch.testing.assert_close(loss.total, error.square().sum(-1).mean())


def test_rows_that_share_a_time_have_the_loss_of_rows_that_do_not():
    flow = cnf.ffjord(2, hidden=(8, 8), context_features=1, end_time=1.5).double()
    objective = FlowMatching(flow, draws=1)
    rows = 3 * LEAST_TIMES
    x, context = torch.randn(rows, 2).double(), torch.randn(rows, 1).double()
    loss = objective(Batch(x, context), generator=generator(3)).total
    noise = generator(3)
    z = torch.randn(rows, 2, dtype=torch.float64, generator=noise)
    t = objective.times.draw(LEAST_TIMES, x, noise).repeat_interleave(3)
    velocity = 1.5 * flow.transform.field(1.5 * t, z + t[:, None] * (x - z), context)
    torch.testing.assert_close(loss, (velocity - (x - z)).square().sum(-1).mean())


class RowsOnly(nn.Module):
    """A field as people write them: x has one batch axis, and time is a column beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, t, x, context=None):
        column = t.expand(x.shape[0]).unsqueeze(1)
        return self.layer(torch.cat([x, column], dim=1))


def test_a_field_of_ones_own_sees_one_batch_axis():
    objective = FlowMatching(flow_of(RowsOnly(), 2), draws=1)
    x = torch.randn(4 * LEAST_TIMES, 2, dtype=torch.float64)
    assert objective(Batch(x), generator=generator()).total.isfinite()


def test_draws_repeat_the_rows():
    flow = flow_of(cnf.nets.TimeMLP(2, (8,)), 2)
    x, weight = torch.randn(16, 2, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    thrice = FlowMatching(flow, draws=3)(Batch(x, weight=weight), generator=generator(3))
    once = FlowMatching(flow, draws=1)(
        Batch(x.repeat(3, 1), weight=weight.repeat(3)), generator=generator(3)
    )
    assert torch.equal(thrice.total, once.total)
    assert FlowMatching(flow).draws == 2
    with pytest.raises(ValueError, match="draws must be at least 1"):
        FlowMatching(flow, draws=0)


def test_each_path_has_its_own_times():
    flow = flow_of(GaussianVelocity())
    assert FlowMatching(flow).times == LateTimes()
    assert FlowMatching(flow, path="vp").times == UniformTimes()
    assert FlowMatching(flow, times="uniform").times == UniformTimes()
    assert FlowMatching(flow, path="vp", times=LateTimes(3.0)).times == LateTimes(3.0)


def test_weights_are_normalised():
    flow = flow_of(GaussianVelocity())
    x = gaussian_data(8)
    all_on_one = torch.zeros(8, dtype=torch.float64)
    all_on_one[3] = 5.0
    weighted = FlowMatching(flow)(Batch(x, weight=all_on_one), generator=generator()).total
    again = FlowMatching(flow)(Batch(x, weight=all_on_one / 5), generator=generator()).total
    torch.testing.assert_close(weighted, again)


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize("coupling", ["independent", "exact", "sinkhorn"])
@pytest.mark.parametrize("times", ["uniform", "late", "logit-normal"])
def test_gradients_reach_every_parameter(path, coupling, times):
    flow = cnf.ffjord(3, hidden=(8, 8), context_features=2, trainable_end_time=True)
    objective = FlowMatching(flow, path=path, coupling=coupling, times=times)
    context = torch.eye(2)[torch.arange(20) % 2]
    loss = objective(Batch(torch.randn(20, 3), context), generator=generator())
    loss.total.backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_same_generator_gives_the_same_loss():
    objective = FlowMatching(cnf.ffjord(2, hidden=(8,)), coupling="sinkhorn")
    batch = Batch(torch.randn(32, 2))
    first, second = (objective(batch, generator=generator(5)).total for _ in range(2))
    assert torch.equal(first, second)


def test_fixed_parts_between_the_continuous_one_and_the_data():
    field = cnf.nets.TimeMLP(2, (8,))
    diagonal = Diagonal(2, scale=2.0).requires_grad_(False)
    chain = Chain([Chain([Continuous(field)]), diagonal, Permutation.reverse(2)])
    chained = cnf.Flow(chain, cnf.Normal(2))
    plain = cnf.Flow(Continuous(field), cnf.Normal(2))
    x = torch.randn(16, 2)
    outside = FlowMatching(chained)(Batch(x), generator=generator()).total
    inside = FlowMatching(plain)(Batch(x.flip(-1) / 2), generator=generator()).total
    torch.testing.assert_close(outside, inside)


@pytest.mark.parametrize("coupling", ["independent", "exact", "sinkhorn"])
def test_weighted_rows_are_paired_as_repeated_ones_are(coupling):
    objective = FlowMatching(flow_of(Polynomial(1)), coupling=coupling)
    x = torch.tensor([-2.0, 2.0], dtype=torch.float64).repeat(1000).unsqueeze(-1)
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(1000)
    weighted = objective(Batch(x, None, weight), generator=generator())
    repeated = objective(Batch(x.repeat_interleave(weight.long(), 0)), generator=generator())
    assert weighted.total.item() == pytest.approx(repeated.total.item(), rel=0.05)


def test_reflow_learns_the_teachers_pairs_in_place_of_the_data():
    teacher = flow_of(Polynomial(1), 1)
    with torch.no_grad():
        teacher.transform.field.a.fill_(2.0)  # every z moves by 2
    flow = flow_of(Polynomial(1), 1)
    objective = FlowMatching(flow, coupling="reflow", teacher=teacher)
    batch = Batch(torch.zeros(32, 1, dtype=torch.float64))
    assert objective(batch).total.item() == pytest.approx(4.0)
    with torch.no_grad():
        flow.transform.field.a.fill_(2.0)
        teacher.transform.field.a.fill_(0.0)  # the objective keeps a copy
    assert objective(batch).total.item() == pytest.approx(0.0, abs=1e-9)
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert names == ["flow.transform.field.a", "flow.transform.field.b"]


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(TypeError, match="begins with Coupling, which only the likelihood"):
        FlowMatching(cnf.Flow(cnf.realnvp(2).transform[0], cnf.Normal(2)))
    with pytest.raises(ValueError, match=r"part 1 of this flow's chain \(Continuous\)"):
        FlowMatching(cnf.ffjord(2, blocks=2))
    with pytest.raises(TypeError, match="begins with Permutation"):
        FlowMatching(
            cnf.Flow(
                Chain([Permutation.reverse(2), Continuous(cnf.nets.TimeMLP(2))]), cnf.Normal(2)
            )
        )


@pytest.mark.parametrize("rows", [LEAST_TIMES, 4 * LEAST_TIMES])
def test_what_is_no_velocity_is_refused(rows):
    class Sum(Polynomial):
        def forward(self, t, x, context=None):
            return super().forward(t, x, context).sum(-1, keepdim=True)

    with pytest.raises(ValueError, match="the velocity must have the shapes of the state"):
        FlowMatching(flow_of(Sum(1), 2))(Batch(torch.zeros(rows, 2, dtype=torch.float64)))


def test_impossible_settings_are_refused():
    flow = cnf.ffjord(2, hidden=(8,))
    with pytest.raises(ValueError, match="coupling='reflow' needs the flow"):
        FlowMatching(flow, coupling="reflow")
    with pytest.raises(ValueError, match="a teacher belongs to coupling='reflow'"):
        FlowMatching(flow, teacher=flow)
    with pytest.raises(ValueError, match=r"the teacher makes x of shape \(3,\)"):
        FlowMatching(flow, coupling="reflow", teacher=cnf.ffjord(3, hidden=(8,)))
    with pytest.raises(ValueError, match="takes a context of 0 features, and the batch has one"):
        FlowMatching(flow)(Batch(torch.zeros(2, 2), torch.zeros(2, 1)))
    conditional = cnf.ffjord(2, hidden=(8,), context_features=3)
    with pytest.raises(ValueError, match="a context of 3 features, and the batch has none"):
        FlowMatching(conditional)(Batch(torch.zeros(2, 2)))
    lone = Batch(torch.randn(64, 2), torch.randn(64, 3))
    with pytest.raises(ValueError, match="all 64 contexts of this batch differ"):
        FlowMatching(conditional, coupling="exact", draws=2)(lone)


def test_it_has_a_name_and_warms_a_likelihood_up():
    assert "flow-matching" in OBJECTIVES
    flow = cnf.ffjord(1, hidden=(16,))
    assert isinstance(build_objective("flow-matching", flow), FlowMatching)
    x = gaussian_data(1000).float()
    history = cnf.fit(
        flow, x, objective=("flow-matching", "likelihood"), shares=(0.9, 0.1), steps=100,
        batch_size=128, validate_every=50,
    )  # fmt: skip
    assert [name for name, _ in history.stages] == ["flow-matching", "likelihood"]
    assert history.best_validation < history.validations[0][2]
