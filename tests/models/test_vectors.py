"""What single models promise beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.distributions import Logistic
from cnf.transforms import UnbiasedLogDet

F64 = torch.float64


def shaken(flow: cnf.Flow, spread: float = 0.4) -> cnf.Flow:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in flow.parameters():
            parameter += spread * torch.randn_like(parameter)
    return flow.double()


def test_every_model_says_what_it_is():
    for name, entry in cnf.models.items():
        assert entry.family, name
        assert entry.summary.endswith("."), name
        assert getattr(cnf, name) is entry.build


def test_nice_takes_the_papers_base():
    assert isinstance(cnf.nice(2, base="logistic").base, Logistic)
    with pytest.raises(ValueError, match="'normal' or 'logistic', got 'cauchy'"):
        cnf.nice(2, base="cauchy")


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester"])
def test_formula_stands_in_either_direction(name):
    build = cnf.models[name].build
    ways = [shaken(build(2, layers=2, formula=way)) for way in ("inverse", "forward")]
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    # the same parameters, chained in the other order and used the other way round
    ways[1].transform.parts = torch.nn.ModuleList(
        part.part for part in reversed(ways[0].transform.parts)
    )
    torch.testing.assert_close(ways[0].encode(z), ways[1].decode(z))
    with pytest.raises(ValueError, match="formula is"):
        build(2, formula="both")


@pytest.mark.parametrize("autoregressive", [False, True])
def test_circular_flow_is_smooth_across_the_seam(autoregressive):
    flow = shaken(cnf.ncsf(3, layers=3, hidden=(8,), autoregressive=autoregressive), spread=0.8)
    x = torch.tensor([[math.pi, 0.3, 1.0], [0.5, math.pi, -2.0], [0.1, 0.2, math.pi]], dtype=F64)
    other = torch.where(x == math.pi, -x, x)
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(other))
    x = flow.sample((100,), generator=torch.Generator().manual_seed(0))
    assert x.abs().max() <= math.pi
    flow.standardize(3 + 2 * x)
    assert flow.log_prob(torch.full((3,), 3.2, dtype=F64)) == -math.inf


def test_mixture_is_the_sum_of_its_components():
    flow = shaken(cnf.mixture(2, components=("nice", "maf", ("nsf", {"layers": 2}))))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    weights = flow.base.log_weights().exp().detach()
    assert float(weights.sum()) == pytest.approx(1)
    densities = [part.log_prob(x).exp() for part in flow.base.parts]
    expected = sum(w * p for w, p in zip(weights, densities, strict=True)).log()
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_mixture_finds_separate_pieces():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 1, generator=generator)
    x = torch.where(torch.arange(1000).unsqueeze(-1) % 4 == 0, x * 0.1 + 5, x * 0.1 - 5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = cnf.mixture(1, components=("nice", "nice"))
    cnf.fit(flow, x, steps=120, lr=0.03, seed=0)
    assert sorted(flow.base.log_weights().exp().tolist()) == pytest.approx([0.25, 0.75], abs=0.1)
    draws = flow.sample((500,), generator=generator)
    assert float((draws > 0).double().mean()) == pytest.approx(0.25, abs=0.1)
    assert float(((draws.abs() - 5).abs() < 1).double().mean()) > 0.95


def test_mixture_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="over the same space"):
        cnf.mixture(2, components=("nice", "ncsf"))
    estimate = ("residual_flow", {"log_det": UnbiasedLogDet()})
    with pytest.raises(ValueError, match="exact density"):
        cnf.mixture(2, components=("nice", estimate))
    with pytest.raises(cnf.UnknownNameError, match="realnvp"):
        cnf.mixture(2, components=("real_nvp",))


def test_residual_flow_saves_how_it_estimates(tmp_path):
    flow = cnf.residual_flow(2, layers=1, hidden=(8,), log_det=UnbiasedLogDet(probes=3))
    flow.save(tmp_path)
    assert cnf.load(tmp_path).transform[0].log_det == UnbiasedLogDet(probes=3)
    assert not flow.transform.exact
