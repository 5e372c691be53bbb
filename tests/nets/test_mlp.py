from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf.nets import MLP, activation
from cnf.nets.activations import ACTIVATIONS
from cnf.registry import UnknownNameError


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("residual", [False, True])
def test_shapes_with_and_without_context(batch, residual):
    x, context = torch.randn(*batch, 3), torch.randn(*batch, 2)
    assert MLP(3, 4, hidden=(8, 8), residual=residual)(x).shape == (*batch, 4)
    net = MLP(3, 4, hidden=(8, 8), residual=residual, context_features=2)
    assert net(x, context).shape == (*batch, 4)


def test_formula_of_a_plain_and_a_residual_network():
    x = torch.randn(5, 3)
    first, second, last = (plain := MLP(3, 2, hidden=(4, 6), zero_last=False)).layers
    torch.testing.assert_close(plain(x), last(second(first(x).relu()).relu()))
    net = MLP(3, 2, hidden=(4,), residual=True, zero_last=False, activation="tanh")
    first, inner, outer, last = net.layers
    h = first(x)
    torch.testing.assert_close(net(x), last(h + outer(inner(h.tanh()).tanh())))


@pytest.mark.parametrize("residual", [False, True])
def test_without_hidden_layers_it_is_linear(residual):
    net = MLP(3, 2, hidden=(), residual=residual, zero_last=False)
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), x @ net.layers[0].weight.T + net.layers[0].bias)


def test_a_zero_last_layer_gives_zeros_and_still_learns():
    net = MLP(3, 2)
    result = net(torch.randn(5, 3))
    assert (result == 0).all()
    (result - 1).square().sum().backward()
    assert net.layers[-1].weight.grad.abs().sum() > 0


def test_the_context_matters_and_is_required():
    net = MLP(3, 2, context_features=1, zero_last=False)
    x = torch.randn(5, 3)
    assert not torch.equal(net(x, torch.zeros(5, 1)), net(x, torch.ones(5, 1)))
    with pytest.raises(ValueError, match=r"context of shape \(\*batch, 1\), got none"):
        net(x)
    with pytest.raises(ValueError, match=r"got shape \(5, 2\)"):
        net(x, torch.zeros(5, 2))


def test_a_network_without_context_ignores_one():
    net, x = MLP(3, 2, zero_last=False), torch.randn(5, 3)
    assert torch.equal(net(x), net(x, torch.randn(5, 7)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"one width for all, got hidden=\(4, 5\)"):
        MLP(3, 2, hidden=(4, 5), residual=True)
    with pytest.raises(ValueError, match="must be positive"):
        MLP(3, 2, hidden=(4, 0))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_keeps_shape_and_dtype(name):
    x = torch.randn(2, 3, dtype=torch.float64)
    made = activation(name)
    assert isinstance(made, nn.Module)
    assert made(x).shape == x.shape
    assert made(x).dtype == x.dtype
    assert activation(name) is not made


def test_an_unknown_activation_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'relu'"):
        activation("rleu")
