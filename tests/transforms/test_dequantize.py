from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.bijections import Affine, FixedAffine, Sigmoid
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.nets import MLP
from cnf.transforms import Chain, Coupling, Dequantize, Elementwise, Inverse, Request

BITS = 3


def seeded(seed: int = 0) -> Request:
    return Request(generator=torch.Generator().manual_seed(seed))


def variational(features: int = 2, bins: int = 4) -> Dequantize:
    """Noise given x by one affine coupling, with weights that are not zero."""
    mask = torch.arange(2 * features) >= features
    net = MLP(features, 2 * features, hidden=(8,), zero_last=False)
    return Dequantize((features,), bins, Coupling(Affine(bound=2.0), net, mask))


def transforms(dtype=torch.float64):
    return [Dequantize((2,), 4).to(dtype), variational().to(dtype)]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_undoes_the_noise(batch, dtype):
    for transform in transforms(dtype):
        x = torch.randint(0, 4, (*batch, 2)).to(dtype)
        z, log_det, costs = transform.inverse(x, request=seeded())
        back = transform(z)
        assert torch.equal(back.value, x)
        assert z.dtype == log_det.dtype == dtype
        assert log_det.shape == back.log_det.shape == batch
        assert costs == {}
        torch.testing.assert_close(back.log_det, -log_det, atol=1e-2, rtol=1e-3)
        assert not transform.bijective
        assert not transform.exact
        assert not Chain([transform]).exact


def test_noise_never_reaches_the_next_integer():
    x = torch.full((1_000_000,), 255.0)
    z = Dequantize((1_000_000,)).inverse(x, request=seeded()).value
    assert (z < 256).all()
    assert torch.equal(z.floor(), x)


def test_noise_is_the_requests():
    for transform in transforms():
        x = torch.tensor([[0.0, 3.0]]).double()
        first, again, other = (transform.inverse(x, request=seeded(s)).value for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        state = torch.get_rng_state()
        transform.inverse(x, request=seeded(1))
        assert torch.equal(torch.get_rng_state(), state)


def test_uniform_noise_is_uniform_and_costs_nothing():
    z, log_det, _ = Dequantize((1,)).inverse(torch.full((50_000, 1), 7.0), request=seeded())
    assert (log_det == 0).all()
    quantiles = (z - 7).flatten().quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=1e-2, rtol=0)


def test_variational_noise_has_the_density_that_it_reports():
    transform = variational(features=1).double().requires_grad_(False)
    x = torch.tensor([2.0]).double()
    # q(u | x) on a grid, by the direction that reads u
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    log_q = transform.forward(x + u[:, None]).log_det
    assert float(log_q.exp().mean()) == pytest.approx(1.0, abs=1e-4)
    # draws follow it
    z, log_det, _ = transform.inverse(x.expand(50_000, 1), request=seeded())
    assert float(z.mean() - 2) == pytest.approx(float((log_q.exp() * u).mean()), abs=5e-3)
    torch.testing.assert_close(transform.forward(z).log_det, -log_det, atol=1e-6, rtol=1e-6)


def categorical(noise: Dequantize) -> tuple[Flow, torch.Tensor]:
    """A flow over {0, …, 3} by a density that varies within the bins, and its true masses."""
    chain = Chain(
        [
            Elementwise(FixedAffine(shift=0.3, scale=0.8), (1,)),
            Elementwise(Sigmoid(), (1,)),
            Elementwise(FixedAffine(scale=4.0), (1,)),
            noise,
        ]
    )
    flow = Flow(chain, Normal(1), standardize=False).double()
    edges = torch.arange(5).double() / 4
    cdf = torch.distributions.Normal(0.3, 0.8).cdf(torch.logit(edges).double())
    return flow, torch.log(cdf.diff())


@pytest.mark.parametrize(
    "noise", [lambda: Dequantize((1,), 4), lambda: variational(1)], ids=["uniform", "variational"]
)
def test_log_prob_is_a_bound_on_the_mass_of_a_bin(noise):
    flow, truth = categorical(noise())
    x = torch.arange(4).double()[:, None, None]
    u = (torch.arange(20_000).double() + 0.5)[:, None] / 20_000
    with torch.no_grad():
        draws = flow.evaluate(x.expand(4, 40_000, 1), request=seeded()).log_prob
        log_q = flow.transform[-1].forward(x + u).log_det
        inner = Flow(Chain(list(flow.transform)[:-1]), Normal(1)).double()
        log_p = inner.log_prob(x + u)
    # truth minus KL(q(u | x) || p(u | x)), by quadrature
    divergence = (log_q.exp() * (log_q - log_p + truth[:, None])).mean(1)
    assert (divergence > 0).all()
    torch.testing.assert_close(draws.mean(1), truth - divergence, atol=5e-2, rtol=0)
    torch.testing.assert_close(log_p.exp().mean(1).log(), truth, atol=1e-4, rtol=0)


def test_training_the_noise_tightens_the_bound():
    flow, truth = categorical(variational(1))
    x = torch.arange(4).double()[:, None].repeat(256, 1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(150):
        loss = -flow.evaluate(x, request=Request(generator=generator)).log_prob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(float(loss.detach() + truth.mean()))
    uniform, _ = categorical(Dequantize((1,), 4))
    with torch.no_grad():
        loose = float(truth.mean() - uniform.evaluate(x, request=seeded()).log_prob.mean())
    assert 0 < sum(gaps[-20:]) / 20 < 0.5 * loose


def test_a_uniform_density_spends_all_bits():
    chain = Chain([Inverse(Elementwise(NormalCDF(), (5,))), Dequantize((5,), 2**BITS)])
    flow = Flow(chain, Normal(5), standardize=False).double()
    x = torch.randint(0, 2**BITS, (7, 5)).double()
    bits = cnf.bits_per_dimension(flow.log_prob(x), (5,))
    torch.testing.assert_close(bits, torch.full((7,), float(BITS)).double())


class NormalCDF(cnf.bijections.ScalarMap):
    """From [0, 2^BITS] to the normal's line; a uniform density comes out flat."""

    size = 0

    def forward(self, z, parameters):
        normal = torch.distributions.Normal(0.0, 1.0)
        x = normal.icdf(z / 2**BITS)
        return x, -normal.log_prob(x) - BITS * math.log(2)

    def inverse(self, x, parameters):
        normal = torch.distributions.Normal(0.0, 1.0)
        return 2**BITS * normal.cdf(x), normal.log_prob(x) + BITS * math.log(2)


def test_a_sample_may_be_asked_for_its_density():
    flow, _ = categorical(variational(1))
    x, log_prob = flow.sample_and_log_prob((100,), request=seeded())
    assert set(x.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert torch.isfinite(log_prob).all()


def test_samples_stay_among_the_values():
    transform = Dequantize((4,), bins=10)
    x = transform(torch.tensor([-0.3, 3.99, 9.2, 10.5])).value
    assert x.tolist() == [0.0, 3.0, 9.0, 9.0]
    unread = variational()(torch.rand(5, 2), request=Request(log_det=False))
    assert torch.isnan(unread.log_det).all()


def test_other_numbers_have_no_density_and_are_named_at_the_start():
    transform = Dequantize((2,), bins=4)
    x = torch.tensor([[0.0, 3.0], [0.5, 1.0], [4.0, 1.0], [-1.0, 1.0]])
    assert transform.inverse(x).log_det.tolist() == [0.0, -math.inf, -math.inf, -math.inf]
    message = r"integers from 0 to 3, got 3 samples with others, values from -1 to 4"
    with pytest.raises(ValueError, match=message):
        transform.initialize(x)
    transform.initialize(x[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dequantize((2,), bins=1), "bins must be at least 2, got 1"),
        (lambda: Dequantize((2,)).inverse(torch.zeros(5, 3)), r"expected \(\*batch, 2\)"),
        (
            lambda: Dequantize((1, 4, 4), noise=Chain([cnf.transforms.Squeeze()])),
            r"x and ε together, \(2, 4, 4\), to that shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
