import copy

import pytest
import torch
from torch.autograd.functional import jacobian

from cnf.transforms.normalization import ActNorm, BatchNorm, Standardize


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


KINDS = [Standardize, ActNorm, BatchNorm]
EVENTS = [(1,), (3,), (2, 3, 2)]


def data(event, samples=50, dtype=torch.float64):
    return 3 * torch.randn(samples, *event, dtype=dtype) + 2


def fitted(kind, event, dtype=torch.float64):
    transform = kind(event).to(dtype).eval()
    transform.initialize(data(event, dtype=dtype))
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return transform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event", EVENTS)
def test_log_det_is_the_jacobians_both_ways(kind, event):
    transform = fitted(kind, event)
    value = data(event)[0]
    for direction in (transform.forward, transform.inverse):
        mapped = direction(value)
        J = jacobian(lambda v, f=direction: f(v).value, value)
        J = J.reshape(value.numel(), value.numel())
        torch.testing.assert_close(mapped.log_det, torch.linalg.slogdet(J).logabsdet)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_round_trip_and_shapes(kind, event, shape, dtype, tolerance):
    transform = fitted(kind, event, dtype)
    z = torch.randn(*shape, *event, dtype=dtype)
    x, log_det, _ = transform(z)
    back, minus, _ = transform.inverse(x)
    assert x.dtype == log_det.dtype == dtype
    assert log_det.shape == minus.shape == shape
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(minus, -log_det)


@pytest.mark.parametrize("kind", KINDS)
def test_initialize_gives_mean_0_and_deviation_1(kind):
    transform = kind((4,)).double().eval()
    identity = transform.inverse(data((4,)))
    assert identity.log_det.abs().max() < 1e-4
    x = data((4,)).reshape(5, 10, 4)
    transform.initialize(x)
    z = transform.inverse(x).value.reshape(-1, 4)
    torch.testing.assert_close(z.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [Standardize, ActNorm])
@pytest.mark.parametrize("unit", [1e-35, 1e20, 3e38])
def test_the_unit_may_be_as_small_or_large_as_the_dtype(kind, unit):
    x = unit * (torch.rand(1000, 2) - 0.5)
    transform = kind((2,))
    transform.initialize(x)
    z = transform.inverse(x).value
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [ActNorm, BatchNorm])
def test_images_share_their_numbers_per_channel(kind):
    transform = kind((2, 3, 3)).double().eval()
    x = data((2, 3, 3))
    transform.initialize(x)
    z = transform.inverse(x).value
    torch.testing.assert_close(
        z.std((0, 2, 3), correction=0), torch.ones(2).double(), rtol=1e-5, atol=0
    )
    assert {p.shape for p in transform.parameters()} == {(2, 1, 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_refuse_what_they_cannot_use(kind):
    transform = kind((2,))
    with pytest.raises(ValueError, match="empty batch"):
        transform.initialize(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        transform.initialize(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"expected \(\*batch, 2\), got \(5, 3\)"):
        transform.initialize(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"expected \(\*batch, 2\), got \(5, 3\)"):
        transform(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"expected \(\*batch, 2\), got \(5, 3\)"):
        transform.inverse(torch.zeros(5, 3))


@pytest.mark.parametrize("kind", [Standardize, ActNorm])
def test_a_constant_feature_keeps_scale_1(kind):
    x = torch.stack([torch.randn(100), torch.full((100,), 0.1)], -1)
    transform = kind((2,))
    transform.initialize(x)
    z = transform.inverse(x).value
    torch.testing.assert_close(z[:, 1], torch.zeros(100), rtol=0, atol=1e-6)
    assert torch.isfinite(transform.inverse(x).log_det).all()


def test_nothing_is_initialised_inside_forward():
    transform = ActNorm((2,))
    before = copy.deepcopy(transform.state_dict())
    transform.inverse(data((2,), dtype=torch.float32))
    transform(data((2,), dtype=torch.float32))
    assert all(torch.equal(before[name], value) for name, value in transform.state_dict().items())


def test_standardize_has_buffers_only_and_saves_them():
    transform = Standardize((2,)).fit(data((2,), dtype=torch.float32))
    assert not list(transform.parameters())
    other = Standardize((2,))
    other.load_state_dict(transform.state_dict())
    torch.testing.assert_close(other.scale, transform.scale)


def test_batch_norm_couples_samples_in_training_and_says_so():
    norm = BatchNorm((3,), momentum=0.25).double()
    assert not norm.bijective
    assert not norm.exact
    x = data((3,))
    z, log_det, _ = norm.inverse(x)
    variance, mean = torch.var_mean(x, 0, correction=0)
    torch.testing.assert_close(z, (x - mean) / (variance + 1e-5).sqrt())
    torch.testing.assert_close(log_det, (-0.5 * (variance + 1e-5).log()).sum().expand(50))
    torch.testing.assert_close(norm.mean, 0.25 * mean)
    torch.testing.assert_close(norm.variance, 0.75 + 0.25 * variance)
    norm.eval()
    assert norm.bijective
    assert norm.exact
    before = norm.mean.clone()
    norm.inverse(x)
    assert torch.equal(norm.mean, before)


def test_batch_norm_gradient_passes_through_the_statistics():
    norm = BatchNorm((2,)).double()
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm.inverse(x).value[:, 0].sum(), x)
    # the mean over the batch is zero whatever x is
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_batch_norm_without_a_variance_uses_the_running_one(shape):
    norm = BatchNorm((2,))
    x = torch.randn(*shape, 2)
    before = norm.mean.clone()
    trained = norm.inverse(x)
    assert torch.equal(norm.mean, before)
    torch.testing.assert_close(trained.value, norm.eval().inverse(x).value)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="momentum"):
        BatchNorm((2,), momentum=0.0)
    with pytest.raises(ValueError, match="at least one axis"):
        ActNorm(())


@pytest.mark.parametrize("kind", [ActNorm, BatchNorm])
def test_gradients(kind):
    transform = fitted(kind, (3,))
    mapped = transform.inverse(data((3,)))
    (mapped.value.square().sum() + mapped.log_det.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in transform.parameters())
