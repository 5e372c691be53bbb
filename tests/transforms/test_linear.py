import math

import pytest
import torch
from torch.autograd.functional import jacobian

from cnf.transforms.base import Request
from cnf.transforms.convolution import Convolution1x1
from cnf.transforms.linear import (
    Diagonal,
    HouseholderLinear,
    LULinear,
    MatrixExponential,
    Permutation,
    QRLinear,
    Rotation,
    SVDLinear,
    Triangular,
    householder,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


BUILDERS = {
    "permutation": lambda n: Permutation.random(n, torch.Generator().manual_seed(0)),
    "reverse": Permutation.reverse,
    "rotation": Rotation,
    "diagonal": Diagonal,
    "lower": Triangular,
    "upper": lambda n: Triangular(n, lower=False, bias=False),
    "lu": lambda n: LULinear(n, order=torch.arange(n).flip(0)),
    "qr": QRLinear,
    "householder": HouseholderLinear,
    "householder-odd": lambda n: HouseholderLinear(n, reflections=3),
    "svd": SVDLinear,
    "expm": MatrixExponential,
}


def build(name, features, dtype=torch.float64, seed=1):
    linear = BUILDERS[name](features).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return linear


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("features", [1, 2, 5])
def test_log_det_is_the_jacobians_both_ways(name, features):
    linear = build(name, features)
    z = torch.randn(features, dtype=torch.float64)
    for direction in (linear.forward, linear.inverse):
        mapped = direction(z)
        J = jacobian(lambda value, f=direction: f(value).value, z)
        torch.testing.assert_close(mapped.log_det, torch.linalg.slogdet(J).logabsdet)
        assert mapped.costs == {}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_round_trip_and_shapes(name, shape, dtype, tolerance):
    linear = build(name, 4, dtype)
    z = torch.randn(*shape, 4, dtype=dtype)
    x, log_det, _ = linear(z, torch.zeros(*shape, 2), Request())
    back, minus, _ = linear.inverse(x)
    assert x.dtype == log_det.dtype == back.dtype == dtype
    assert x.shape == z.shape
    assert log_det.shape == shape
    torch.testing.assert_close(back, z, rtol=0, atol=tolerance)
    torch.testing.assert_close(minus, -log_det)


@pytest.mark.parametrize("name", BUILDERS)
def test_matrix_is_the_map(name):
    linear = build(name, 3)
    z = torch.randn(7, 3, dtype=torch.float64)
    bias = 0 if linear.bias is None else linear.bias
    torch.testing.assert_close(linear(z).value, z @ linear.matrix().to(z).mT + bias)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients(name):
    linear = build(name, 3)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: tuple(linear(v)[:2]), z)
    assert torch.autograd.gradcheck(lambda v: tuple(linear.inverse(v)[:2]), z)
    mapped = linear.inverse(z)
    (mapped.value.square().sum() + mapped.log_det.sum()).backward()
    for parameter in linear.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["rotation", "diagonal", "lower", "upper", "qr", "householder", "svd", "expm"]
)
@pytest.mark.parametrize("features", [1, 2, 5])
def test_starts_as_the_identity(name, features):
    linear = BUILDERS[name](features).double()
    torch.testing.assert_close(linear.matrix(), torch.eye(features, dtype=torch.float64))
    assert torch.as_tensor(linear.log_abs_det()).item() == 0


def test_rotation_in_the_plane():
    angle = 0.7
    rotation = Rotation(2, angle).double()
    expected = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    torch.testing.assert_close(
        rotation.matrix(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
    )
    assert rotation(torch.randn(3, 2).double()).log_det.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="3 features has 3 angles, got 2"):
        Rotation(3, [0.1, 0.2])


def test_affine_of_a_normal_is_the_shifted_normal():
    a, b = 1.7, -0.3
    x = torch.linspace(-3, 3, 9, dtype=torch.float64).unsqueeze(-1)
    z, log_det, _ = Diagonal(1, scale=a, shift=b).double().inverse(x)
    got = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_det
    expected = torch.distributions.Normal(b, a).log_prob(x).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_householder_product():
    vectors = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = torch.eye(3, dtype=torch.float64)
    for v in vectors.unbind(-2):
        outer = v.unsqueeze(-1) * v.unsqueeze(-2)
        expected = expected @ (
            torch.eye(3, dtype=torch.float64) - 2 * outer / v.square().sum(-1)[:, None, None]
        )
    torch.testing.assert_close(householder(vectors), expected)


def test_lu_from_a_matrix_keeps_signs_and_order():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    linear = LULinear.from_matrix(matrix)
    torch.testing.assert_close(linear.matrix(), matrix)
    torch.testing.assert_close(linear.log_abs_det(), torch.linalg.slogdet(matrix).logabsdet)
    other = LULinear(5).double()
    other.load_state_dict(linear.state_dict())
    torch.testing.assert_close(other.matrix(), matrix)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"each of 0..n-1 exactly once, got \[0, 0\]"):
        Permutation([0, 0])
    with pytest.raises(ValueError, match=r"Diagonal expected \(\*batch, 3\), got \(4, 2\)"):
        Diagonal(3)(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="scales must be positive"):
        Diagonal(2, scale=-1.0)
    with pytest.raises(ValueError, match="singular"):
        LULinear.from_matrix(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="square"):
        LULinear.from_matrix(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="order must have 3 entries"):
        LULinear(3, order=[1, 0])
    with pytest.raises(ValueError, match="at least 1"):
        Triangular(0)


def test_convolution_has_the_textbooks_log_det():
    diagonal = torch.tensor([2.0, 0.5, 0.8], dtype=torch.float64).diag()
    convolution = Convolution1x1(LULinear.from_matrix(diagonal))
    log_det = convolution(torch.randn(3, 32, 32, dtype=torch.float64)).log_det
    assert log_det.item() == pytest.approx(32 * 32 * math.log(0.8))
    assert log_det.item() == pytest.approx(-228.5, abs=0.05)


@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (0,)])
def test_convolution_is_a_linear_map_of_channels(shape):
    convolution = Convolution1x1.random(3, torch.Generator().manual_seed(0)).double()
    Q = convolution.linear.matrix()
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3).double(), rtol=0, atol=1e-6)
    z = torch.randn(*shape, 3, 2, 4, dtype=torch.float64)
    x, log_det, _ = convolution(z)
    weight = Q.detach()[:, :, None, None]
    torch.testing.assert_close(
        x.reshape(-1, 3, 2, 4), torch.nn.functional.conv2d(z.reshape(-1, 3, 2, 4), weight)
    )
    assert log_det.shape == shape
    torch.testing.assert_close(convolution.inverse(x).value, z)
    with pytest.raises(ValueError, match=r"expected \(\*batch, 3, height, width\)"):
        convolution(torch.zeros(2, 2, 2))


def test_convolution_log_det_is_the_jacobians():
    convolution = Convolution1x1(build("lu", 2))
    z = torch.randn(2, 2, 3, dtype=torch.float64)
    J = jacobian(lambda v: convolution(v).value, z).reshape(12, 12)
    torch.testing.assert_close(convolution(z).log_det, torch.linalg.slogdet(J).logabsdet)
