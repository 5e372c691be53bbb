from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd.functional import jacobian

import cnf
from cnf.nets import MADE, MaskedLinear
from cnf.nets.growing import _product
from cnf.nets.products import FEW

GRAPH = torch.tensor(
    [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
).bool()
HIDDEN = [(), (1,), (3, 8), (2, 2, 2), (16, 16)]
STRUCTURES = {
    "natural": {},
    "reverse": {"order": "reverse"},
    "random": {"order": "random"},
    "given": {"order": (2, 0, 4, 1, 3)},
    "passes-1": {"passes": 1},
    "passes-2": {"passes": 2, "order": "reverse"},
    "passes-3": {"passes": 3},
    "graph": {"adjacency": GRAPH},
    "residual": {"residual": True, "hidden": (6, 6)},
    "residual-narrow": {"residual": True, "hidden": (2,)},
    "angles": {"period": 3.0, "order": "reverse"},
}


def build(features=5, outputs=2, **kwargs):
    made = MADE(features, outputs, activation="tanh", zero_last=False, **kwargs)
    return made.double()


def structures(hidden=HIDDEN):
    """Every structure, with every hidden width where it leaves that open."""
    return [
        pytest.param({"hidden": widths, **kwargs}, id=f"{name}-{widths}")
        for name, kwargs in STRUCTURES.items()
        for widths in (hidden if "hidden" not in kwargs else [kwargs["hidden"]])
    ]


def sees(function, x):
    """Which outputs' features depend on which inputs."""
    return (jacobian(function, x) != 0).any(1)


def affine(z, parameters):
    assert parameters.shape == (*z.shape, 2)
    return z * parameters[..., 0].tanh().exp() + parameters[..., 1]


def affine_array(z, parameters):
    return affine(torch.from_numpy(z), torch.from_numpy(parameters)).numpy()


@pytest.mark.parametrize("kwargs", structures())
@pytest.mark.parametrize("context_features", [0, 2])
def test_outputs_depend_on_exactly_what_they_should(kwargs, context_features):
    made = build(context_features=context_features, **kwargs)
    context = torch.randn(context_features).double() if context_features else None
    x = torch.randn(5).double()
    if "adjacency" in kwargs:
        expected = GRAPH
    else:
        group = made.place * kwargs.get("passes", 5) // 5
        expected = group.unsqueeze(1) > group
    assert torch.equal(sees(lambda x: made(x, context), x), expected)
    if context_features:
        assert sees(lambda context: made(x, context), context).all()


@pytest.mark.parametrize("kwargs", structures())
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("array_step", [None, affine_array])
def test_the_incremental_direction_agrees_with_the_parallel_one(
    kwargs, context_features, array_step
):
    made = build(context_features=context_features, **kwargs)
    for batch in [(), (5,), (2, 3), (0,), (0, 3)]:
        z = torch.randn(*batch, 5).double()
        context = torch.randn(*batch, context_features).double() if context_features else None
        with torch.set_grad_enabled(array_step is None):
            x = made.autoregress(affine, z, context, array_step)
        assert x.shape == z.shape
        torch.testing.assert_close(x, affine(z, made(x, context)), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("grad", [True, False])
def test_float32_agrees_to_rounding(activation, grad):
    made = MADE(43, 2, zero_last=False, activation=activation)
    z = torch.randn(64, 43)
    with torch.set_grad_enabled(grad):
        x = made.autoregress(affine, z, array_step=affine_array)
    assert x.dtype == torch.float32
    assert x.is_contiguous() == grad
    torch.testing.assert_close(x, affine(z, made(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_large_products_in_arrays_agree_too(activation):
    made = MADE(2, 2, zero_last=False, activation=activation)
    z = torch.randn(512, 2)
    with torch.no_grad():
        assert any(layer.product is _product for layer in made._growing_arrays(None, 512))
        x = made.autoregress(affine, z, array_step=affine_array)
        torch.testing.assert_close(x, affine(z, made(x)), atol=1e-5, rtol=1e-5)


def test_full_masks_are_known_also_after_loading():
    full, masked = MaskedLinear(torch.ones(4, 3).bool()), MaskedLinear(torch.eye(4, 3).bool())
    assert full.full
    assert not masked.full
    full.load_state_dict(masked.state_dict())
    assert torch.equal(full.masked_weight, masked.weight * torch.eye(4, 3))
    assert torch.equal(full(torch.ones(3)), masked(torch.ones(3)))


@pytest.mark.parametrize("way", ["copied", "saved", "loaded"])
@pytest.mark.parametrize("features", [2, FEW - 1, FEW])
def test_masks_travel_however_they_lie_in_memory(features, way, tmp_path):
    torch.manual_seed(0)
    flow, x = cnf.maf(features, layers=2, hidden=(12, 12)), torch.randn(300, features)
    with torch.no_grad():
        for parameter in flow.parameters():  # away from the identity
            parameter.add_(0.1 * torch.randn_like(parameter))
    if way == "copied":
        other = copy.deepcopy(flow)
    elif way == "saved":
        flow.save(tmp_path)
        other = cnf.load(tmp_path)
    else:  # from a state whose masks lie row by row
        other = cnf.maf(features, layers=2, hidden=(12, 12))
        state = {name: value.contiguous() for name, value in flow.state_dict().items()}
        other.load_state_dict(state)
    masks = {name: value for name, value in flow.state_dict().items() if name.endswith("mask")}
    assert len(masks) == 6
    for name, mask in masks.items():
        layer = flow.get_submodule(name.removesuffix(".mask"))
        assert mask.shape == layer.weight.shape
        assert torch.equal(other.state_dict()[name], mask)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    with torch.no_grad():
        assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_arrays_stand_in_only_where_they_can():
    made = MADE(3, 2, zero_last=False)
    z = torch.randn(5, 3)

    def never(z, parameters):
        raise AssertionError("not here")

    expected = made.autoregress(affine, z, array_step=never)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda z: made.autoregress(affine, z, array_step=never))
        torch.testing.assert_close(mapped(z[None])[0], expected)
        with pytest.raises(RuntimeError, match="dtype"):
            made.autoregress(affine, z.double(), array_step=never)
        half = made.bfloat16().autoregress(affine, z.bfloat16(), array_step=never)
        torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kwargs", structures([(2, 7), (8, 8)]))
def test_gradients_of_the_incremental_direction(kwargs):
    made = build(context_features=1, **kwargs)
    z, context = torch.randn(2, 5).double(), torch.randn(2, 1).double()
    z.requires_grad_()
    context.requires_grad_()

    def run(z, context):
        return made.autoregress(affine, z, context)

    assert torch.autograd.gradcheck(run, (z, context))
    # to the parameters, by the implicit function theorem: dx/dθ = −(∂F/∂x)⁻¹ ∂F/∂θ
    x = run(z, context)
    weights = torch.randn_like(x)
    incremental = torch.autograd.grad((x * weights).sum(), list(made.parameters()))
    x = x.detach()
    matrix = torch.stack(
        [
            jacobian(lambda y, i=i: y - affine(z[i], made(y, context[i])), x[i])
            for i in range(len(x))
        ]
    ).detach()
    adjoint = torch.linalg.solve(matrix.mT, weights)
    residual = affine(z, made(x, context))
    implicit = torch.autograd.grad((residual * adjoint).sum(), list(made.parameters()))
    torch.testing.assert_close(incremental, implicit)


def test_every_hidden_unit_is_computed_once(monkeypatch):
    made = MADE(43, 2, hidden=(64, 50), zero_last=False)
    rows = []
    original = torch.addmm

    def counting(bias, weight, inputs):
        rows.append(len(weight) * weight.shape[1])
        return original(bias, weight, inputs)

    monkeypatch.setattr(torch, "addmm", counting)
    z = torch.randn(3, 43)
    made.autoregress(affine, z)
    full_pass = sum(layer.weight.numel() for layer in made.layers)
    assert sum(rows) < 0.6 * full_pass
    assert len(rows) <= 43 * 3


@pytest.mark.parametrize("context_features", [0, 2])
def test_one_feature(context_features):
    made = build(1, 3, context_features=context_features)
    context = torch.randn(4, 2).double() if context_features else None
    x = torch.randn(4, 1).double()
    assert made(x, context).shape == (4, 1, 3)
    assert torch.equal(made(x, context), made(x + 1, context))
    found = made.autoregress(lambda _, p: p[..., 0] + p[..., 2], x, context)
    torch.testing.assert_close(found, made(x, context)[..., [0, 2]].sum(-1))


@pytest.mark.parametrize("hidden", [(), (2,), (16, 16)])
@pytest.mark.parametrize("context_features", [0, 2])
def test_a_zero_last_layer_gives_zeros_and_still_learns(hidden, context_features):
    made = MADE(5, 2, hidden=hidden, context_features=context_features)
    context = torch.randn(4, 2) if context_features else None
    result = made(torch.randn(4, 5), context)
    assert (result == 0).all()
    (result - 1).square().sum().backward()
    assert made.layers[-1].weight.grad.abs().sum() > 0


def test_initial_units_are_equally_loud_whatever_they_see():
    layer = MaskedLinear(torch.ones(400, 400).tril().bool())
    deviation = layer(torch.randn(2000, 400))[:, [3, 30, 399]].std(0)
    assert deviation.max() < 3 * deviation.min()
    assert (layer.masked_weight.triu(1) == 0).all()


def test_random_orders_follow_the_generator_and_travel_with_the_state():
    orders = [
        MADE(9, 1, order="random", generator=torch.Generator().manual_seed(seed)).order
        for seed in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    one, two = (build(9, order="random", passes=4, context_features=1) for _ in range(2))
    assert not torch.equal(one.order, two.order)
    two.load_state_dict(one.state_dict())
    z, context = torch.randn(3, 9).double(), torch.randn(3, 1).double()
    for made in (one, two):
        x = made.autoregress(affine, z, context)
        torch.testing.assert_close(x, affine(z, one(x, context)))


def test_an_order_lists_features_from_first_to_last():
    made = build(3, 1, order=(2, 0, 1))
    expected = torch.tensor([[False, False, True], [True, False, True], [False, False, False]])
    assert torch.equal(sees(made, torch.randn(3).double()), expected)
    assert torch.equal(build(3, 1, order=torch.tensor([2, 0, 1])).order, made.order)


def test_a_cycle_is_named():
    graph = torch.zeros(4, 4).bool()
    graph[0, 2] = graph[2, 1] = graph[1, 0] = graph[3, 0] = True
    with pytest.raises(ValueError, match=r"has a cycle: 0 → 2 → 1 → 0 "):
        MADE(4, 1, adjacency=graph)
    with pytest.raises(ValueError, match=r"has a cycle: 1 → 1 "):
        MADE(2, 1, adjacency=[[False, False], [True, True]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order": (0, 0, 1)}, r"permutation of 0 to 2, got \(0, 0, 1\)"),
        ({"order": "sideways"}, "got 'sideways'"),
        ({"passes": 4}, "passes must be 1 to 3"),
        ({"passes": 0}, "passes must be 1 to 3"),
        ({"adjacency": torch.zeros(2, 3)}, r"shape \(3, 3\), got \(2, 3\)"),
        ({"adjacency": torch.zeros(3, 3), "order": "reverse"}, "not both"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MADE(3, 1, **kwargs)


def test_a_missing_context_is_named():
    made = MADE(3, 2, context_features=2)
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="needs a context"):
        made(z)
    with pytest.raises(ValueError, match="needs a context"):
        made.autoregress(affine, z)
