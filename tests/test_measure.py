from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Uniform
from torch.distributions import Normal as Univariate

import cnf
from cnf.measure import entropy, kl
from cnf.transforms import Diagonal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scaled(scale, features=2):
    return cnf.Flow(Diagonal(features, scale=scale), cnf.Normal(features)).double()


def log_of(scale):
    return math.log(2 * math.pi) + 1 + 2 * math.log(scale)


def test_the_entropy_of_a_gaussian():
    value, stderr = entropy(scaled(3.0), 20_000, generator=generator())
    assert value == pytest.approx(log_of(3.0), abs=4 * stderr)
    # −log p varies by ½ χ² with two degrees of freedom, whose variance is one
    assert stderr == pytest.approx(1 / math.sqrt(20_000), rel=0.05)


def test_the_entropy_of_a_target():
    target = cnf.data.toy("8gaussians")
    value, stderr = entropy(target, 20_000, generator=generator())
    assert value == pytest.approx(target.entropy, abs=4 * stderr)


def test_the_divergence_between_gaussians():
    value, stderr = kl(scaled(1.0), scaled(2.0), 50_000, generator=generator())
    exact = 2 * math.log(2) + (1 / 4 - 1)
    assert value == pytest.approx(exact, abs=4 * stderr)
    assert stderr < 0.01


def test_a_distribution_does_not_differ_from_itself():
    assert kl(scaled(2.0), scaled(2.0), 100, generator=generator()) == (0.0, 0.0)


def test_targets_flows_and_torch_distributions_mix():
    target = cnf.data.toy("8gaussians")
    flow = scaled(3.0).float()
    torch.manual_seed(0)
    normal = MultivariateNormal(torch.zeros(2), 9 * torch.eye(2))
    assert kl(normal, flow, 100).value == pytest.approx(0.0, abs=1e-5)
    assert kl(flow, normal, 100, generator=generator()).value == pytest.approx(0.0, abs=1e-5)
    wide = kl(target, flow, 5000, generator=generator())
    # −E_p[log q] of a Gaussian needs p's second moment only: 8 + 2 · ¼/2 per plane
    second = 16 / 1.414**2 + 2 * (0.5 / 1.414) ** 2
    exact = math.log(2 * math.pi * 9) + second / 18 - target.entropy
    assert wide.value == pytest.approx(exact, abs=4 * wide.stderr)


def test_conditional_flows_are_looked_at_in_one_context():
    flow = cnf.maf(2, context_features=3)  # starts as the identity
    at = torch.tensor([1.0, 0.0, 0.0])
    assert kl(flow, flow, 50, context=at, generator=generator()).value == 0.0
    assert kl(flow, cnf.Normal(2), 50, context=at, generator=generator()).value == pytest.approx(
        0.0, abs=1e-5
    )
    assert math.isfinite(entropy(flow, 50, context=at, generator=generator()).value)
    with pytest.raises(ValueError, match="conditional"):
        entropy(flow, 50)


def test_no_mass_is_an_infinite_divergence():
    box = Independent(Uniform(torch.zeros(2), torch.ones(2), validate_args=False), 1)
    assert kl(scaled(3.0), box, 200, generator=generator()).value == math.inf


def test_the_same_generator_gives_the_same_estimate():
    first, second = (kl(scaled(1.0), scaled(2.0), 100, generator=generator(4)) for _ in range(2))
    assert first == second


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least two samples"):
        entropy(scaled(1.0), 1)
    with pytest.raises(TypeError, match="cannot sample a str"):
        entropy("pinwheel")
    with pytest.raises(ValueError, match="global generator only"):
        entropy(Univariate(0.0, 1.0), 10, generator=generator())
    with pytest.raises(ValueError, match=r"wrap its batch axes in torch.distributions.Independent"):
        entropy(Univariate(torch.zeros(2), torch.ones(2)), 10)
