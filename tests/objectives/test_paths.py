from __future__ import annotations

import pytest
import torch

from cnf.objectives.paths import (
    LateTimes,
    LinearPath,
    LogitNormalTimes,
    UniformTimes,
    VariancePreserving,
    as_path,
    as_times,
)
from cnf.registry import UnknownNameError

T = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.mark.parametrize("path", [LinearPath(), LinearPath(0.1), VariancePreserving()], ids=str)
def test_the_velocity_is_the_derivative_of_the_position(path):
    t = T.clone().requires_grad_()
    z, x = torch.tensor([[1.3]]).double().expand(7, 1), torch.tensor([[-0.4]]).double().expand(7, 1)
    point = path.at(t)
    (slope,) = torch.autograd.grad(point.position(z, x).sum(), t)
    torch.testing.assert_close(slope[:, None], point.velocity(z, x))


def test_linear_paths_are_straight():
    z, x = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    point = LinearPath().at(T)
    torch.testing.assert_close(point.position(z, x), z + T[:, None] * (x - z))
    torch.testing.assert_close(point.velocity(z, x), x - z)


def test_sigma_min_is_the_spread_left_at_the_data():
    point = LinearPath(0.1).at(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(point.base, torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(point.data, torch.tensor([0.0, 1.0]))


def test_the_variance_is_preserved_from_base_to_data():
    point = VariancePreserving().at(T)
    torch.testing.assert_close(point.base**2 + point.data**2, torch.ones_like(T))
    ends = VariancePreserving().at(torch.tensor([0.0, 1.0]).double())
    assert ends.base[0] > 0.9999
    assert ends.base[1] < 2e-3
    assert ends.data[1] > 0.9999
    # Song et al.'s alpha at s = 1/2
    middle = VariancePreserving().at(torch.tensor([0.5]).double()).data
    expected = torch.tensor([-0.25 * 0.5**2 * 19.9 - 0.5 * 0.5 * 0.1]).double().exp()
    torch.testing.assert_close(middle, expected, rtol=1e-6, atol=0)


def test_times_cover_their_distribution_evenly():
    like = torch.empty(0, dtype=torch.float64)
    t = UniformTimes().draw(1000, like, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    cells = (t * 1000).floor().sort().values
    assert torch.equal(cells, torch.arange(1000).double())
    assert not torch.equal((t * 1000).floor(), cells)
    assert UniformTimes().draw(0, like).shape == (0,)


def test_logit_normal_times_have_their_moments():
    like = torch.empty(0, dtype=torch.float64)
    t = LogitNormalTimes(0.5, 2.0).draw(20_000, like, torch.Generator().manual_seed(0))
    logit = t.logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logit.std().item() == pytest.approx(2.0, abs=0.01)


def test_late_times_have_their_density():
    like = torch.empty(0, dtype=torch.float64)
    t = LateTimes(3.0).draw(20_000, like, torch.Generator().manual_seed(0))
    # P(T <= t) = 1 - (1 - t)^(1/3)
    for place in (0.1, 0.5, 0.9, 0.999):
        below = (t <= place).double().mean().item()
        assert below == pytest.approx(1 - (1 - place) ** (1 / 3), abs=1e-4)
    u = torch.linspace(0, 1, 11).double()
    torch.testing.assert_close(LateTimes(1.0).quantile(u), UniformTimes().quantile(u))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LateTimes(0.0), "power must be positive"),
        (lambda: LinearPath(1.0), r"sigma_min must lie in \[0, 1\)"),
        (lambda: VariancePreserving(0.0), "0 < beta_min <= beta_max"),
        (lambda: VariancePreserving(least=0.0), "least must lie between"),
        (lambda: LogitNormalTimes(scale=0.0), "scale must be positive"),
    ],
)
def test_impossible_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_names():
    assert as_path("vp") == VariancePreserving()
    assert as_path(LinearPath(0.1)) == LinearPath(0.1)
    assert as_times("logit-normal") == LogitNormalTimes()
    assert as_times("late") == LateTimes(2.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        as_path("linaer")
    with pytest.raises(UnknownNameError, match="distribution of times"):
        as_times("never")
