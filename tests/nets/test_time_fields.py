"""Velocity fields: their products and traces against autograd, times, contexts, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf import compiling
from cnf.divergence import Exact, Hutchinson, push
from cnf.nets import ConditionedMLP, ConvField, PotentialField, ResidualField, TimeMLP
from cnf.nets.conditioning import ADAPTERS
from cnf.nets.conv_field import TIME_CONVS
from cnf.nets.time import TIME_LAYERS
from cnf.registry import UnknownNameError

F64 = torch.float64


def conv(kind, **more):
    return lambda: (ConvField(2, (3, 3), conditioning=kind, context_features=2, **more), (2, 4, 4))


FIELDS = {
    **{
        f"mlp, {kind}": lambda kind=kind: (
            TimeMLP(3, (5, 4), conditioning=kind, context_features=2),
            (3,),
        )
        for kind in TIME_LAYERS
    },
    **{
        f"mlp, {kind}, {by}": lambda kind=kind, by=by: (
            ConditionedMLP(3, 2, (5, 4), by=by, conditioning=kind),
            (3,),
        )
        for by in ADAPTERS
        for kind in ("ignore", "concatsquash", "hyper")
    },
    "residual": lambda: (ResidualField(3, 8, 2, context_features=2), (3,)),
    "potential": lambda: (PotentialField(3, 6, context_features=2), (3,)),
    "potential, deep": lambda: (PotentialField(3, 6, 4, context_features=2), (3,)),
    "potential, low rank": lambda: (PotentialField(3, 6, rank=1, context_features=2), (3,)),
    "swish": lambda: (TimeMLP(3, (6, 5), context_features=2, activation="swish"), (3,)),
    "residual, swish": lambda: (ResidualField(3, 6, context_features=2, activation="swish"), (3,)),
    "conv, swish": conv("concat", activation="swish"),
    **{f"conv, {kind}": conv(kind) for kind in TIME_CONVS},
    "conv, strided": conv("concatsquash", strides=(2, 1, -2)),
    "conv, strided, hyper": conv("hyper", strides=(2, 1, -2)),
    "conv, strided, coordinates": conv("concatcoord", strides=(2, -2, 1)),
    "conv, squeezing": conv("blend", squeeze=True),
}


def build(name):
    torch.manual_seed(0)
    field, event = FIELDS[name]()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return field.double(), event


def points(*shape: int, seed: int = 1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


every = pytest.mark.parametrize("name", FIELDS)
T = torch.tensor(0.3, dtype=F64)


def jacobian(field, t, x, context):
    size = x.numel()
    found = torch.autograd.functional.jacobian(lambda x: field(t, x, context), x)
    return found.reshape(size, size)


@every
def test_products_and_trace_are_autograds(name):
    field, event = build(name)
    x, context, u = points(2, *event), points(2, 2, seed=2), points(4, 2, *event, seed=3)
    velocity, products = push(field, T, x, context, u)
    divergence = Exact()
    noise = divergence.draw(field, T, x, context, None)
    traced = divergence(field, T, x, context, noise)
    torch.testing.assert_close(velocity, field(T, x, context))
    torch.testing.assert_close(traced.velocity, velocity)
    for i in range(2):
        expected = jacobian(field, T, x[i], context[i])
        images = u[:, i].reshape(4, -1) @ expected.T
        torch.testing.assert_close(products[:, i].reshape(4, -1), images, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(traced.divergence[i], expected.trace(), atol=1e-9, rtol=1e-9)


@every
@pytest.mark.parametrize("probes", [1, 3])
def test_estimates_of_the_trace_are_products_with_their_probes(name, probes):
    field, event = build(name)
    x, context = points(2, *event), points(2, 2, seed=2)
    divergence = Hutchinson(probes)
    noise = divergence.draw(field, T, x, context, torch.Generator().manual_seed(0))
    found = divergence(field, T, x, context, noise)
    velocity, products = push(field, T, x, context, noise)
    wanted = (noise * products).flatten(2).sum(-1)
    torch.testing.assert_close(found.velocity, velocity)
    torch.testing.assert_close(found.samples, wanted)
    torch.testing.assert_close(found.divergence, wanted.mean(0))


@pytest.mark.parametrize(
    "name",
    [
        *[f"mlp, {kind}" for kind in ("ignore", "concatsquash", "blend")],
        *[f"mlp, concatsquash, {by}" for by in ADAPTERS],
        "residual",
        "potential",
        "swish",
    ],
)
def test_compiled_code_computes_the_same(name):
    field, event = build(name)
    x, context, u = points(2, 3, *event), points(2, 3, 2, seed=2), points(2, 2, 3, *event, seed=3)
    trace, estimate = Exact(), Hutchinson(2)
    basis = trace.draw(field, T, x, context, None)

    def everything(t, x, context):
        return (
            field(t, x, context),
            trace(field, t, x, context, basis).divergence,
            estimate(field, t, x, context, u).samples,
        )

    def differentiated(function):
        found = function(T, x, context)
        total = sum(part.sin().sum() for part in found)
        wanted = (x, context, *field.parameters())
        grads = torch.autograd.grad(total, wanted, materialize_grads=True, allow_unused=True)
        return *[part.detach() for part in found], *grads

    compiled = compiling.compiled(everything, backend="aot_eager", whole=True)
    with torch.no_grad():  # by columns, where that pays
        torch.testing.assert_close(compiled(T, x, context), everything(T, x, context))
    x.requires_grad_()
    context.requires_grad_()
    torch.testing.assert_close(
        differentiated(compiled), differentiated(everything), atol=1e-9, rtol=1e-7
    )


@pytest.mark.parametrize("batch", [(3,), (9,), (2, 5)], ids=str)
@pytest.mark.parametrize("features", [2, 6])
@pytest.mark.parametrize("hidden", [(7,), (5, 6), (5, 6, 7), (4, 5, 6, 7)], ids=str)
def test_traces_of_every_depth_and_batch(hidden, features, batch):
    torch.manual_seed(0)
    field = TimeMLP(features, hidden).double()
    x = points(*batch, features).requires_grad_()
    parameters = [x, *field.parameters()]
    _, trace = field.trace(T, x, None)
    rows = [jacobian(field, T, row, None).trace() for row in x.detach().reshape(-1, features)]
    torch.testing.assert_close(trace.flatten(), torch.stack(rows), atol=1e-12, rtol=1e-9)

    basis = torch.eye(features, dtype=F64).view(features, *[1] * len(batch), features)
    _, products = field.push(T, x, None, basis.expand(features, *batch, features))
    wanted = torch.einsum("i...i->...", products)
    for found, expected in zip(
        torch.autograd.grad(trace.sum(), parameters, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(wanted.sum(), parameters, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


@every
def test_a_scalar_time_is_one_for_every_sample(name):
    field, event = build(name)
    x, context, u = points(2, 3, *event), points(2, 3, 2, seed=2), points(2, 2, 3, *event, seed=3)
    times = torch.full((2, 3), float(T), dtype=F64)
    torch.testing.assert_close(field(times, x, context), field(T, x, context))
    for ours, theirs in zip(
        push(field, times, x, context, u), push(field, T, x, context, u), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@every
def test_every_sample_has_its_own_time(name):
    field, event = build(name)
    x, context, times = (
        points(3, *event),
        points(3, 2, seed=2),
        torch.tensor([0.0, 0.4, 1.0]).double(),
    )
    together = field(times, x, context)
    for i in range(3):
        torch.testing.assert_close(together[i], field(times[i], x[i], context[i]))


@every
@pytest.mark.parametrize("batch", [(), (0,), (2, 1), (2, 0, 3)], ids=str)
def test_any_batch_axes(name, batch):
    field, event = build(name)
    x, context, u = points(*batch, *event), points(*batch, 2), points(3, *batch, *event)
    velocity, products = push(field, T, x, context, u)
    assert velocity.shape == x.shape
    assert products.shape == u.shape
    assert field(torch.zeros(batch, dtype=F64), x, context).shape == x.shape


@every
def test_context_and_every_parameter_count(name):
    field, event = build(name)
    x, context = points(2, *event), points(2, 2, seed=2).requires_grad_()
    field(T, x, context).square().sum().backward()
    assert context.grad.ne(0).any()
    # a constant added to a potential moves nothing
    idle = {name for name, p in field.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= {"affine.bias"}
    if "ignore" not in name:
        moved = field(T + 0.2, x, context)
        assert not torch.allclose(moved, field(T, x, context))


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("features", [1, 2, 7])
def test_a_potentials_gradient_and_trace(features, layers):
    torch.manual_seed(0)
    field = PotentialField(features, 8, layers, context_features=1).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter)
    x, context = points(6, features).requires_grad_(), points(6, 1, seed=2)
    velocity, divergence = field.trace(T, x, context)
    total = field.potential(T, x, context).sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    torch.testing.assert_close(velocity, -slope, atol=1e-9, rtol=1e-9)
    laplacian = sum(
        torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i]
        for i in range(features)
    )
    torch.testing.assert_close(divergence, -laplacian, atol=1e-9, rtol=1e-9)


def test_a_potential_in_single_precision_and_far_out():
    torch.manual_seed(0)
    field = PotentialField(3, 16)
    x = torch.randn(50, 3)
    trace = field.trace(T.float(), x, None)[1]
    double = field.double().trace(T, x.double(), None)[1]
    torch.testing.assert_close(trace.double(), double, atol=1e-6, rtol=1e-6)
    assert field.potential(T, 1e4 * x.double(), None).isfinite().all()


def test_fields_that_start_at_rest():
    field = ResidualField(3, 8)
    assert not field(torch.tensor(0.0), torch.ones(2, 3)).any()


def test_a_learned_activation_is_each_networks_own():
    first, second = (TimeMLP(2, (8,), activation="swish") for _ in range(2))
    with torch.no_grad():
        first.activation.beta += 1
    assert second.activation.beta == 1
    names = [name for name, _ in first.named_parameters() if "activation" in name]
    assert names == ["activation.beta"]
    assert all("activation" not in name for name, _ in TimeMLP(2, (8,)).named_parameters())


@pytest.mark.parametrize("by", ADAPTERS)
def test_adapters_change_nothing_at_first(by):
    torch.manual_seed(0)
    field = ConditionedMLP(3, 2, (5,), by=by).double()
    x = points(4, 3)
    torch.testing.assert_close(field(T, x, points(4, 2)), field(T, x, points(4, 2, seed=5)))


def test_arguments_are_checked():
    for build, match in (
        (lambda: TimeMLP(2, conditioning="conkat"), "Did you mean 'concat'"),
        (lambda: ConvField(1, conditioning="squashy"), "Did you mean 'squash'"),
        (lambda: ConvField(1, activation="relu"), "no smooth activation is called 'relu'"),
        (lambda: ResidualField(1, activation="relu"), "no smooth activation is called 'relu'"),
        (lambda: ConditionedMLP(2, 1, by="films"), "Did you mean 'film'"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            build()
    for build, match in (
        (lambda: ConvField(1, (4,), strides=(2, 1)), "as many halvings"),
        (lambda: ConvField(1, (4,), strides=(3, -3)), "a stride is 1, 2"),
        (lambda: ConvField(1, (4,), strides=(1,)), "each of the 2 layers"),
        (lambda: PotentialField(2, layers=1), "at least 2 layers, got 1"),
        (lambda: ResidualField(2, frequencies=0), "at least one frequency"),
        (lambda: ConditionedMLP(2, 0), "context_features must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    with pytest.raises(ValueError, match="halves its images to a 4th, which 6×8"):
        ConvField(1, (2, 2), strides=(2, -2, 1), squeeze=True)(T.float(), torch.zeros(1, 6, 8))
