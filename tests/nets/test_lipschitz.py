import math

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.nn.functional import conv2d

from cnf.nets.lipschitz import (
    LipschitzConvNet,
    LipschitzMLP,
    LipSwish,
    contraction_activation,
    convolution_norm,
    operator_norm,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 1)])
def test_operator_norm_is_torchs(norm, shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = torch.linalg.matrix_norm(weight, norm)
    torch.testing.assert_close(operator_norm(weight, norm), expected)
    assert torch.autograd.gradcheck(lambda w: operator_norm(w, norm), weight)


def test_wide_layers_are_bounded_from_above():
    weight = torch.randn(600, 530)
    exact = torch.linalg.matrix_norm(weight, 2)
    got = operator_norm(weight)
    assert exact <= got <= 1.02 * exact
    assert torch.equal(operator_norm(weight), got)


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_norm_bounds_the_dense_matrix(norm, kernel):
    weight = torch.randn(3, 2, kernel, kernel, dtype=torch.float64)

    def convolve(image):
        return conv2d(image.reshape(1, 2, 4, 5), weight, padding=kernel // 2).flatten()

    dense = jacobian(convolve, torch.zeros(40, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(dense, norm)
    bound = convolution_norm(weight, (4, 5), norm)
    assert exact <= bound * (1 + 1e-12)
    assert bound <= 1.5 * exact


@pytest.mark.parametrize("name", ["lipswish", "elu", "relu", "sine", "softplus", "tanh"])
def test_activations_have_slopes_of_at_most_one(name):
    activation = contraction_activation(name).double()
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(z).sum(), z)
    assert slope.abs().max() <= 1 + 1e-9


def test_lipswish_uses_its_slope_whatever_beta():
    activation = LipSwish().double()
    z = torch.linspace(-60, 60, 20001, dtype=torch.float64, requires_grad=True)
    for beta in (-2.0, 0.5, 5.0):
        with torch.no_grad():
            activation.beta.fill_(beta)
        (slope,) = torch.autograd.grad(activation(z).sum(), z)
        assert 0.99 < slope.abs().max() <= 1


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
def test_mlp_contracts(norm):
    net = LipschitzMLP(4, hidden=(8, 8), lipschitz=0.9, norm=norm, context_features=2).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 10
    context = 5 * torch.randn(2, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(4, dtype=torch.float64)
        J = jacobian(lambda v: net(v, context), x)
        assert torch.linalg.matrix_norm(J, norm) <= 0.9 + 1e-9


def test_small_weights_are_left_alone():
    net = LipschitzMLP(2, hidden=(), lipschitz=0.9).double()
    with torch.no_grad():
        net.weights[0].copy_(0.1 * torch.eye(2))
    x = torch.randn(2, dtype=torch.float64)
    torch.testing.assert_close(net(x), 0.1 * x + net.biases[0])


def test_conv_net_contracts_and_takes_a_context():
    net = LipschitzConvNet(
        (2, 3, 4), hidden=(5, 5), kernels=(3, 1, 3), lipschitz=0.9, context_features=2
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 10
    context = torch.randn(2, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    J = jacobian(lambda v: net(v, context), x).reshape(24, 24)
    assert torch.linalg.matrix_norm(J, 2) <= 0.9
    batch = net(torch.randn(2, 1, 2, 3, 4).double(), torch.randn(2, 1, 2).double())
    assert batch.shape == (2, 1, 2, 3, 4)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"\(0, 1\) for a contraction, got 1.0"):
        LipschitzMLP(2, lipschitz=1.0)
    with pytest.raises(ValueError, match="1, 2 or infinity"):
        LipschitzMLP(2, norm=3.0)
    with pytest.raises(ValueError, match="known: lipswish, elu"):
        LipschitzMLP(2, activation="gelu")
    with pytest.raises(ValueError, match="2 odd kernel sizes for 1 hidden layers"):
        LipschitzConvNet((1, 2, 2), hidden=(3,), kernels=(2, 2))
    with pytest.raises(ValueError, match="pass context="):
        LipschitzMLP(2, context_features=1)(torch.zeros(2))


@pytest.mark.parametrize("name", ["lipswish", "elu", "tanh"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_products_are_the_jacobians(name, kind):
    if kind == "vector":
        net = LipschitzMLP(3, hidden=(5, 4), activation=name, context_features=2).double()
        shape = (3,)
    else:
        net = LipschitzConvNet(
            (2, 2, 3), hidden=(3,), kernels=(3, 1), activation=name, context_features=2
        ).double()
        shape = (2, 2, 3)
    g = net.prepare(torch.randn(4, 2, dtype=torch.float64))
    x = torch.randn(4, *shape, dtype=torch.float64)
    tangents = torch.randn(6, 4, *shape, dtype=torch.float64)
    value, push = g.linearize(x)
    torch.testing.assert_close(value, g(x))
    pushed = push(tangents)
    for tangent, got in zip(tangents, pushed, strict=True):
        torch.testing.assert_close(got, torch.func.jvp(g, (x,), (tangent,))[1])
