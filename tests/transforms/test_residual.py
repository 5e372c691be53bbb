import math

import pytest
import torch
from torch.autograd.functional import jacobian

from cnf.bijections import InversionError
from cnf.nets.lipschitz import LipschitzConvNet, LipschitzMLP
from cnf.registry import decode, encode
from cnf.transforms.base import Chain, Inverse, Request
from cnf.transforms.residual import ExactLogDet, Residual, TruncatedLogDet, UnbiasedLogDet


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def block(features=3, dtype=torch.float64, lipschitz=0.9, log_det=None, context=0, norm=2.0):
    generator = torch.Generator().manual_seed(features)
    net = LipschitzMLP(
        features,
        hidden=(16, 16),
        lipschitz=lipschitz,
        context_features=context,
        norm=norm,
        generator=generator,
    )
    with torch.no_grad():
        # far beyond the bound, so that the bound is what holds it
        for weight in net.weights:
            weight *= 6
    return Residual(net, log_det=log_det).to(dtype)


def images(dtype=torch.float64, log_det=None):
    net = LipschitzConvNet((2, 2, 3), hidden=(4,), kernels=(3, 3), lipschitz=0.8)
    with torch.no_grad():
        for weight in net.weights:
            weight *= 4
    return Residual(net, log_det=log_det).to(dtype)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_log_det_is_the_jacobians_both_ways(features, norm):
    transform = block(features, norm=norm)
    value = torch.randn(features, dtype=torch.float64)
    for direction in (transform.forward, transform.inverse):
        mapped = direction(value)
        J = jacobian(lambda v, f=direction: f(v).value, value)
        torch.testing.assert_close(mapped.log_det, torch.linalg.slogdet(J).logabsdet)
        assert mapped.log_det.abs() > 1e-6


def test_log_det_of_images_is_the_jacobians():
    transform = images()
    value = torch.randn(2, 2, 3, dtype=torch.float64)
    J = jacobian(lambda v: transform.inverse(v).value, value).reshape(12, 12)
    torch.testing.assert_close(transform.inverse(value).log_det, torch.linalg.slogdet(J).logabsdet)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["vector", "context", "image"])
def test_round_trip_and_shapes(shape, dtype, tolerance, kind):
    transform = images(dtype) if kind == "image" else block(dtype=dtype, context=2)
    event = (2, 2, 3) if kind == "image" else (3,)
    z = torch.randn(*shape, *event, dtype=dtype)
    context = torch.randn(*shape, 2, dtype=dtype)
    x, log_det, costs = transform(z, context)
    back, minus, _ = transform.inverse(x, context)
    assert x.dtype == log_det.dtype == back.dtype == dtype
    assert x.shape == back.shape == z.shape
    assert log_det.shape == minus.shape == shape
    assert costs == {}
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=tolerance)
    again = transform(transform.inverse(z, context).value, context).value
    torch.testing.assert_close(again, z, rtol=0, atol=tolerance)


def test_gradients_through_both_directions():
    transform = block(2, context=2, lipschitz=0.7)
    value = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for direction in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(
            lambda v, c, f=direction: tuple(f(v, c)[:2]), (value, context)
        )


def test_implicit_gradients_of_the_parameters():
    transform = block(2, lipschitz=0.7)
    z = torch.randn(4, 2, dtype=torch.float64)
    parameters = list(transform.parameters())

    def loss():
        x, log_det, _ = transform(z)
        return x.sin().sum() + log_det.sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            below = loss()
            parameter += 1e-6 * direction
        expected = (above - below) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)


def test_second_derivatives_exist_one_way_and_are_refused_the_other():
    transform = block(2)
    value = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: tuple(transform.inverse(v)[:2]), value)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(transform(value).value.sum(), value, create_graph=True)


def test_exact_is_repeatable_also_in_training_and_inference_mode():
    transform = block()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = transform.train().inverse(x).log_det
    assert torch.equal(transform.inverse(x).log_det, expected)
    assert torch.equal(transform.eval().inverse(x).log_det, expected)
    with torch.inference_mode():
        torch.testing.assert_close(transform.inverse(x).log_det, expected)
        torch.testing.assert_close(transform.inverse(transform(x).value).value, x)
    state = transform.state_dict()
    assert not [name for name, _ in transform.named_buffers()]
    other = block()
    other.load_state_dict(state)
    assert torch.equal(other.inverse(x).log_det, expected)


def test_starts_as_the_identity_when_asked():
    transform = Residual(LipschitzMLP(2, zero_last=True)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    z, log_det, _ = transform.inverse(x)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(log_det, torch.zeros(4).double())
    (log_det.sum() + z.square().sum()).backward()
    for parameter in transform.parameters():
        assert torch.isfinite(parameter.grad).all()
    assert transform.net.weights[-1].grad.abs().max() > 0


ESTIMATES = [
    TruncatedLogDet(20, probes=1500),
    TruncatedLogDet(20, probes=1500, noise="gaussian", neumann=False),
    UnbiasedLogDet(probes=1500, parameter=0.3),
    UnbiasedLogDet(probes=1500, parameter=0.3, certain=1, neumann=False),
    UnbiasedLogDet("poisson", 4.0, probes=1500),
]


@pytest.mark.parametrize("estimate", ESTIMATES, ids=repr)
def test_estimates_and_their_gradients_are_unbiased(estimate):
    # L^20 is 4e-5 here, so that the truncated series counts as unbiased too
    exact, transform = block(lipschitz=0.6), block(lipschitz=0.6, log_det=estimate)
    assert exact.exact
    assert not transform.exact
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    truth = exact.inverse(x).log_det
    mapped = transform.inverse(x, None, Request(generator=generator, variance=True))
    error = mapped.costs["log_det_variance"].sqrt()
    assert 0 < error < 0.02
    assert (mapped.log_det - truth).abs() < 4 * error
    inputs = (x, exact.net.weights[0])
    expected = torch.autograd.grad(truth, inputs)
    got = torch.autograd.grad(mapped.log_det, (x, transform.net.weights[0]))
    for a, b in zip(got, expected, strict=True):
        scale = b.norm()
        assert (a - b).norm() < 0.2 * scale


def test_the_truncation_error_shrinks_as_the_bound_says():
    x = torch.randn(3, dtype=torch.float64)
    truth = block(lipschitz=0.8).inverse(x).log_det
    for terms in (1, 3, 9):
        transform = block(lipschitz=0.8, log_det=TruncatedLogDet(terms, probes=3000))
        request = Request(generator=torch.Generator().manual_seed(0), variance=True)
        mapped = transform.inverse(x, None, request)
        bound = 3 * 0.8 ** (terms + 1) / ((terms + 1) * 0.2)
        error = mapped.costs["log_det_variance"].sqrt()
        assert (mapped.log_det - truth).abs() < bound + 4 * error


def test_noise_comes_from_the_requests_generator():
    transform = block(log_det=UnbiasedLogDet())
    x = torch.randn(2, 3, dtype=torch.float64)

    def draw(seed):
        request = Request(generator=torch.Generator().manual_seed(seed))
        return transform.inverse(x, None, request).log_det

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    with torch.inference_mode():
        torch.testing.assert_close(draw(0), draw(0))


@pytest.mark.parametrize("law", ["geometric", "poisson"])
def test_roulette_draws_from_the_law_it_weights_by(law):
    estimate = UnbiasedLogDet(law, 0.4)
    grid = ((torch.arange(10_000) + 0.5) / 10_000).tolist()
    counts = torch.tensor([estimate._draw(u) for u in grid])
    for count in range(5):
        frequency = (counts >= count).double().mean().item()
        assert frequency == pytest.approx(estimate._survival(count), abs=2e-4)


def test_what_nobody_asks_for_is_not_computed():
    transform = block()
    mapped = transform.inverse(torch.randn(4, 3).double(), None, Request(log_det=False))
    assert mapped.log_det.isnan().all()
    assert mapped.log_det.shape == (4,)
    variance = transform.inverse(torch.randn(4, 3).double(), None, Request(variance=True)).costs
    assert variance["log_det_variance"].tolist() == [0.0] * 4


def test_in_a_chain_and_inverted():
    chain = Chain([block(2), Inverse(block(2))])
    assert chain.exact
    z = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(chain.inverse(chain(z).value).value, z)


def test_a_nan_stays_alone():
    z = torch.randn(3, 2, dtype=torch.float64)
    z[1, 0] = math.nan
    x = block(2)(z).value
    assert x[1].isnan().all()
    assert torch.isfinite(x[[0, 2]]).all()


def test_log_dets_are_records():
    for estimate in (ExactLogDet(), *ESTIMATES):
        assert decode(encode(estimate)) == estimate


def test_errors_say_what_was_expected():
    transform = block(lipschitz=0.99)
    transform.max_iterations = 2
    with pytest.raises(InversionError, match="after 2 steps"):
        transform(torch.randn(3).double())
    with pytest.raises(ValueError, match="needs at least two of them"):
        block(log_det=UnbiasedLogDet()).inverse(
            torch.randn(3).double(), None, Request(variance=True)
        )
    with pytest.raises(ValueError, match="terms must be at least 1"):
        TruncatedLogDet(0)
    with pytest.raises(ValueError, match="positive and below 1, got 1"):
        UnbiasedLogDet(parameter=1.0)
    with pytest.raises(ValueError, match="'geometric' or 'poisson'"):
        UnbiasedLogDet("uniform")
    with pytest.raises(ValueError, match="pass context="):
        block(context=1)(torch.randn(3).double())
