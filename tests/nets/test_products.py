"""Layers of few inputs: the same values and gradients, whichever way the products go."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from cnf.nets import MADE, MLP
from cnf.nets.products import FEW, MANY, Linear


@pytest.mark.parametrize("inputs", [1, 2, FEW - 1, FEW])
@pytest.mark.parametrize("batch", [(), (3,), (MANY,), (2, MANY)])
def test_values_and_gradients_are_torchs(inputs, batch):
    torch.manual_seed(0)
    ours = Linear(inputs, 5).double()
    theirs = nn.Linear(inputs, 5).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*batch, inputs, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (ours, theirs):
        y = layer(x)
        wanted = (x, layer.weight, layer.bias)
        firsts = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        seconds = torch.autograd.grad(firsts[0].square().sum(), (x, layer.weight))
        found.append((y, *firsts, *seconds))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("build", [lambda: MLP(2, 4), lambda: MADE(2, 2)], ids=["mlp", "made"])
def test_layers_are_called_with_their_hooks(build):
    net, seen = build(), []
    for layer in net.layers:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    net(torch.randn(5, 2))
    assert seen == [*net.layers]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("network", ["mlp", "made"])
def test_hooks_see_layers_as_they_return_and_change_no_gradient(network, residual):
    torch.manual_seed(0)
    sizes = {"hidden": (8, 8), "residual": residual, "zero_last": False}
    net = MLP(3, 6, **sizes) if network == "mlp" else MADE(3, 2, **sizes)
    x = torch.randn(5, 3, requires_grad=True)
    wanted = [x, *net.parameters()]
    expected = torch.autograd.grad(net(x).sin().sum(), wanted)
    seen, passed, called = [], [], []
    for layer in net.layers:
        layer.register_forward_hook(lambda layer, _, value: seen.append(value))
        layer.register_full_backward_hook(lambda layer, *_: passed.append(layer))
    net.activation.register_forward_hook(lambda activation, *_: called.append(activation))
    found = torch.autograd.grad(net(x).sin().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert bool((seen[0] < 0).any())  # before the activation
    assert passed == [*net.layers][::-1]
    assert called == [net.activation] * (4 if residual else 2)


@pytest.mark.parametrize("watched", ["layer", "activation", "everything"])
@pytest.mark.parametrize("network", ["mlp", "made"])
def test_whoever_sees_a_value_sees_it_stay(network, watched):
    torch.manual_seed(0)
    sizes = {"hidden": (8, 8), "zero_last": False}
    net = MLP(3, 6, **sizes) if network == "mlp" else MADE(3, 2, **sizes)
    x, seen = torch.randn(5, 3), []

    def watch(module, taken, returned):
        if module is not net:
            seen.extend((value, value.clone()) for value in (*taken, returned))

    expected = net(x)
    if watched == "everything":
        hook = register_module_forward_hook(watch)
    else:
        module = net.layers[0] if watched == "layer" else net.activation
        hook = module.register_forward_hook(watch)
    try:
        found = net(x)
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    assert len(seen) == {"layer": 2, "activation": 4, "everything": 10}[watched]
    assert any(bool((value < 0).any()) for value, _ in seen)
    assert all(torch.equal(value, then) for value, then in seen)


def test_a_linear_layer_of_another_class_applies_as_it_says():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net, x = MLP(3, 2, hidden=(4,), zero_last=False), torch.randn(5, 3)
    first, last = net.layers[0], net.layers[1]
    net.layers[0] = doubled = Doubled(3, 4)
    doubled.load_state_dict(first.state_dict())
    torch.testing.assert_close(net(x), last((2 * first(x)).relu()))


def test_relu_leaves_alone_what_is_not_a_linear_layers_own():
    net = MLP(4, 1, hidden=(4, 4))
    net.layers[0] = nn.Identity()
    x = torch.randn(5, 4)
    before = x.clone()
    net(x)
    assert torch.equal(x, before)
