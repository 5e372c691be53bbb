import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from cnf.bijections import Additive, Affine, RationalQuadratic
from cnf.transforms.elementwise import Elementwise


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


MAPS = [Additive(), Affine(), RationalQuadratic(bins=5, bound=4.0)]


def build(scalar_map, event_shape, dtype=torch.float64):
    transform = Elementwise(scalar_map, event_shape).to(dtype)
    with torch.no_grad():
        transform.values += torch.randn_like(transform.values)
    return transform


@pytest.mark.parametrize("scalar_map", MAPS, ids=repr)
@pytest.mark.parametrize("event_shape", [(1,), (3,), (2, 2, 3)])
def test_log_det_is_the_jacobians_both_ways(scalar_map, event_shape):
    transform = build(scalar_map, event_shape)
    value = torch.randn(event_shape, dtype=torch.float64)
    for direction in (transform.forward, transform.inverse):
        mapped = direction(value)
        J = jacobian(lambda v, f=direction: f(v).value, value)
        J = J.reshape(value.numel(), value.numel())
        torch.testing.assert_close(mapped.log_det, torch.linalg.slogdet(J).logabsdet)


@pytest.mark.parametrize("scalar_map", MAPS, ids=repr)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("conditional", [False, True])
def test_round_trip_and_shapes(scalar_map, shape, dtype, tolerance, conditional):
    if conditional:
        net = nn.Linear(2, 3 * scalar_map.size, dtype=dtype)
        transform = Elementwise(scalar_map, (3,), net)
        assert transform.values is None
    else:
        transform = build(scalar_map, (3,), dtype)
    z = torch.randn(*shape, 3, dtype=dtype)
    context = torch.randn(*shape, 2, dtype=dtype)
    x, log_det, costs = transform(z, context)
    back, minus, _ = transform.inverse(x, context)
    assert x.dtype == log_det.dtype == dtype
    assert log_det.shape == minus.shape == shape
    assert costs == {}
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(minus, -log_det, rtol=tolerance, atol=tolerance)


def test_starts_as_the_identity():
    z = torch.randn(5, 3)
    for scalar_map in MAPS:
        x, log_det, _ = Elementwise(scalar_map, (3,))(z)
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-5)


def test_each_sample_has_its_own_context():
    net = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
    transform = Elementwise(Affine(), (1,), net)
    x = transform(torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [2.0]])).value
    assert x.flatten().tolist() == [0.0, 1.0, 2.0]


def test_gradients_reach_parameters_and_context():
    transform = build(Affine(), (2,))
    mapped = transform.inverse(torch.randn(4, 2, dtype=torch.float64))
    (mapped.value.square().sum() + mapped.log_det.sum()).backward()
    assert transform.values.grad.abs().min() > 0
    conditional = Elementwise(Affine(), (2,), nn.Linear(3, 4))
    context = torch.randn(4, 3, requires_grad=True)
    conditional.inverse(torch.randn(4, 2), context).value.sum().backward()
    assert context.grad.abs().sum() > 0


def test_state_and_copies():
    transform = build(Affine(), (2,))
    other = Elementwise(Affine(), (2,)).double()
    other.load_state_dict(transform.state_dict())
    z = torch.randn(2, dtype=torch.float64)
    assert torch.equal(other(z).value, transform(z).value)
    assert torch.equal(copy.deepcopy(transform)(z).value, transform(z).value)
    assert "Affine" in repr(transform)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"expected \(\*batch, 2\), got \(3,\)"):
        Elementwise(Affine(), (2,))(torch.zeros(3))
    with pytest.raises(ValueError, match="pass context="):
        Elementwise(Affine(), (2,), nn.Linear(1, 4))(torch.zeros(2))
    with pytest.raises(ValueError, match="must return 4 numbers per sample"):
        Elementwise(Affine(), (2,), nn.Linear(1, 3))(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="at least one axis"):
        Elementwise(Affine(), ())
