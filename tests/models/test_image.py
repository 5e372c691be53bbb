from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.transforms import ActNorm, Convolution1x1, Coupling, Dequantize, Multiscale

SHAPE = (1, 4, 4)
MODELS = {
    "realnvp": lambda **more: cnf.realnvp(SHAPE, layers=2, hidden=(4,), **more),
    "glow": lambda **more: cnf.glow(SHAPE, depth=2, hidden=(4,), **more),
    "flowpp": lambda **more: cnf.flowpp(SHAPE, layers=2, hidden=(4,), components=3, **more),
}
DEQUANTIZE = ["uniform", "variational"]
both = pytest.mark.parametrize("name", list(MODELS))


def integers(*batch: int, bins: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, bins, (*batch, *SHAPE), generator=generator).float()


def parts(flow: cnf.Flow, kind: type) -> int:
    return sum(isinstance(module, kind) for module in flow.modules())


@both
@pytest.mark.parametrize("dequantize", DEQUANTIZE)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_integers_have_a_finite_bound(name, dequantize, batch):
    flow = MODELS[name](dequantize=dequantize, bins=8)
    x = integers(*batch)
    log_prob = flow.log_prob(x)
    assert log_prob.shape == batch
    assert torch.isfinite(log_prob).all()
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert not flow.transform.bijective
    assert not flow.transform.exact
    assert flow.log_prob(x + 0.5).isneginf().all()


@both
@pytest.mark.parametrize("dequantize", DEQUANTIZE)
def test_samples_are_integers(name, dequantize):
    flow = MODELS[name](dequantize=dequantize, bins=8, context_features=2)
    x = flow.sample((3,), torch.zeros(4, 2), temperature=0.7)
    assert x.shape == (3, 4, *SHAPE)
    assert torch.equal(x, x.round())
    assert x.min() >= 0
    assert x.max() <= 7
    assert torch.isfinite(flow.log_prob(x, torch.zeros(2))).all()


@both
def test_integers_are_not_standardised_and_the_context_is(name):
    flow = MODELS[name](dequantize="uniform", bins=8, context_features=1)
    x, context = integers(64), 5 + torch.randn(64, 1)
    flow.standardize(x, context)
    assert torch.equal(flow.scaling.inverse(x).value, x)
    torch.testing.assert_close(flow.context_scaling.loc, context.mean(0))
    assert torch.isfinite(flow.log_prob(x, context)).all()


@both
def test_fit_starts_from_the_data_and_learns(name):
    flow = MODELS[name](dequantize="variational", bins=8)
    x = integers(200) // 4  # only zeros and ones of eight values
    before = cnf.bits_per_dimension(flow.log_prob(x), SHAPE).mean()
    history = cnf.fit(flow, x, steps=20, batch_size=64)
    after = cnf.bits_per_dimension(flow.log_prob(x), SHAPE).mean()
    assert after < before
    # a coin costs one bit, and a fifth of a lesson cannot do better
    assert 1 - 0.05 < after < 3
    assert history.best_validation is not None
    assert bool(flow.initialized)


def test_a_second_fit_does_not_start_again():
    flow = MODELS["glow"](dequantize="uniform", bins=8)
    cnf.fit(flow, integers(100), steps=1)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    cnf.fit(flow, integers(100) // 4, steps=1, lr=1e-12)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6)


def test_a_fit_is_repeatable():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        flow = MODELS["glow"](dequantize="uniform", bins=8)
        torch.rand(len(found))  # the global generator has no part in it
        history = cnf.fit(flow, integers(100), steps=3, seed=1)
        found.append([nats for _, _, nats in history.validations])
    assert found[0] == found[1]


@both
@pytest.mark.parametrize("dequantize", DEQUANTIZE)
def test_saved_flow_is_the_same_to_the_bit(name, dequantize, tmp_path):
    flow = MODELS[name](dequantize=dequantize, bins=8)
    x = integers(5)
    cnf.fit(flow, integers(50), steps=1)
    flow.save(tmp_path)
    loaded = cnf.load(tmp_path)
    requests = [cnf.Request(generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    expected = flow.evaluate(x, request=requests[0]).log_prob
    assert torch.equal(loaded.evaluate(x, request=requests[1]).log_prob, expected)
    assert bool(loaded.initialized)


@pytest.mark.parametrize("name", ["realnvp", "glow", "flowpp"])
def test_vectors_may_be_integers_too(name):
    for dequantize in DEQUANTIZE:
        for features in (1, 3):
            flow = cnf.models[name].build(features, hidden=(8,), dequantize=dequantize, bins=4)
            x = torch.randint(0, 4, (5, features)).float()
            assert torch.isfinite(flow.log_prob(x)).all()
            assert set(flow.sample((5,)).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_glow_is_built_as_in_the_paper():
    flow = cnf.glow((3, 32, 32), levels=3, depth=4, hidden=(16, 16), dequantize="uniform")
    assert flow.base.event_shape == (3072,)
    (multiscale,) = (m for m in flow.modules() if isinstance(m, Multiscale))
    assert multiscale.stay == [(6, 16, 16), (12, 8, 8), (48, 4, 4)]
    assert parts(flow, Convolution1x1) == 12
    # a coupling for each step, and a prior on what leaves after the first two levels
    assert parts(flow, Coupling) == 12 + 2
    assert parts(flow, ActNorm) == 12 + 1
    assert parts(flow, Dequantize) == 1


def test_flowpp_has_the_papers_couplings():
    flow = cnf.flowpp((3, 32, 32), hidden=(8,), components=2)
    assert parts(flow, Coupling) == 4 + 2 + 3
    assert flow.base.event_shape == (12, 16, 16)


def test_realnvp_has_the_papers_couplings():
    flow = cnf.realnvp((3, 32, 32), layers=6, levels=3, hidden=(8,))
    assert parts(flow, Coupling) == 2 * (3 + 3) + 4


def test_a_new_glow_without_data_is_a_scaled_normal():
    # couplings start as the identity and 1×1 convolutions as rotations
    flow = cnf.glow(SHAPE, dequantize="uniform", bins=8, margin=None).double()
    x = integers(5).double()
    request = cnf.Request(generator=torch.Generator().manual_seed(0))
    z = flow.evaluate(x, request=request)
    radius = z.z.square().sum(-1)
    expected = -0.5 * radius - 8 * math.log(2 * math.pi) - 16 * math.log(8)
    torch.testing.assert_close(z.log_prob, expected, atol=1e-5, rtol=1e-5)


def test_temperature_scales_the_latent():
    flow = cnf.glow(SHAPE, depth=2, hidden=(4,)).double()
    cold, warm = (
        flow.sample((5,), temperature=t, generator=torch.Generator().manual_seed(0))
        for t in (0.5, 1.0)
    )
    torch.testing.assert_close(flow.encode(cold), 0.5 * flow.encode(warm))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cnf.glow((1, 28, 28), levels=3), "7×7 cannot be squeezed by 2: use fewer levels"),
        (lambda: cnf.glow((28, 28)), r"\(channels, height, width\), got \(28, 28\)"),
        (lambda: cnf.glow(SHAPE, levels=0), "at least one level"),
        (lambda: cnf.realnvp(SHAPE, dequantize="yes"), "one of none, uniform, variational"),
        (
            lambda: cnf.fit(cnf.glow(SHAPE, dequantize="uniform"), integers(50) / 8, steps=1),
            "dequantisation takes integers from 0 to 255",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
