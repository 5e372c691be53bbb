from __future__ import annotations

import itertools

import pytest
import torch

from cnf.objectives.coupling import ExactTransport, Independent, Sinkhorn, as_coupling, pair
from cnf.registry import UnknownNameError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cost(z, x):
    return (z - x).square().sum().item()


def test_exact_transport_is_the_best_of_all_permutations():
    z, x = torch.randn(6, 2, generator=generator(1)), torch.randn(6, 2, generator=generator(2))
    chosen = ExactTransport().choose(z, x)
    best = min(cost(z[list(order)], x) for order in itertools.permutations(range(6)))
    assert cost(z[chosen], x) == pytest.approx(best)


def test_exact_transport_in_parts_deals_everything_out_once():
    z, x = torch.randn(10, 1, 3, 3), torch.randn(10, 1, 3, 3)
    chosen = ExactTransport(rows=4).choose(z, x)
    assert torch.equal(chosen.sort().values, torch.arange(10))
    assert set(chosen[:4].tolist()) == {0, 1, 2, 3}
    assert ExactTransport().choose(z[:0], x[:0]).shape == (0,)


def test_the_entropic_plan_has_both_marginals():
    z, x = torch.randn(40, 2, generator=generator(1)), torch.randn(40, 2, generator=generator(2))
    plan = Sinkhorn(epsilon=0.1, iterations=300, tolerance=1e-4).log_plan(z, x).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((40,), 1 / 40), rtol=1e-4, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((40,), 1 / 40), rtol=1e-3, atol=0)


def test_sinkhorn_lies_between_independent_and_exact():
    z, x = torch.randn(60, 2, generator=generator(1)), torch.randn(60, 2, generator=generator(2))
    exact = cost(z[ExactTransport().choose(z, x)], x)
    means = []
    for epsilon in (0.01, 0.3, 100.0):
        coupling = Sinkhorn(epsilon=epsilon, iterations=200)
        plan = coupling.log_plan(z, x).exp()
        chosen = coupling.choose(z, x, generator())
        assert torch.equal(chosen, plan.multinomial(1, generator=generator()).squeeze(1))
        means.append(60 * (plan * torch.cdist(x, z).square()).sum().item())
    assert exact < means[0] < means[1] < means[2]
    assert means[0] < 1.3 * exact
    assert means[2] == pytest.approx(torch.cdist(z, x).square().mean().item() * 60, rel=0.01)


def test_sinkhorn_of_a_single_row_or_of_equal_points():
    assert Sinkhorn().choose(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [0]
    assert len(set(Sinkhorn().choose(torch.ones(50, 2), torch.ones(50, 2)).tolist())) > 10


@pytest.mark.parametrize("coupling", [ExactTransport(), Sinkhorn()], ids=str)
def test_pairs_stay_within_their_context(coupling):
    context = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])[torch.arange(60) % 3]
    # by distance alone every z would go to another context
    z = torch.cat([context.roll(1, 0) * 100, torch.randn(60, 1)], 1)
    x = torch.cat([context * 100, torch.randn(60, 1)], 1)
    paired = pair(coupling, z, x, context, generator())
    assert torch.equal(paired[:, :2], z[:, :2])
    assert not torch.equal(paired[:, 2], z[:, 2])
    if isinstance(coupling, ExactTransport):
        for value in range(3):
            rows = torch.arange(60) % 3 == value
            assert torch.equal(paired[rows, 2].argsort(), x[rows, 2].argsort())


def test_contexts_that_never_repeat_cannot_be_paired():
    z = x = context = torch.randn(64, 2)
    with pytest.raises(ValueError, match="needs coupling='independent'"):
        pair(ExactTransport(), z, x, context)
    # in a few rows it may be an accident, and leaves them as they are
    assert torch.equal(pair(ExactTransport(), z[:5], x[:5], context[:5]), z[:5])
    assert torch.equal(pair(Independent(), z, x, context), z)


def test_names_and_impossible_numbers():
    assert as_coupling("exact") == ExactTransport()
    assert as_coupling(Sinkhorn(0.2)) == Sinkhorn(0.2)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'exact'.*reflow"):
        as_coupling("exacd")
    with pytest.raises(ValueError, match="at least 2"):
        ExactTransport(rows=1)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        Sinkhorn(epsilon=0.0)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        Sinkhorn(iterations=0)
