from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd.functional import jacobian

import cnf
from cnf.bijections import Additive, Affine, RationalQuadratic, ScalarMap
from cnf.nets import MADE
from cnf.transforms import Autoregressive, Chain, Inverse
from cnf.transforms.base import Request

BATCHES = [(), (5,), (2, 3), (0,)]
MAPS = [Additive(), Affine(bound=3.0), RationalQuadratic(bins=4)]


def build(scalar_map, features=4, **kwargs):
    net = MADE(
        features, scalar_map.size, hidden=(8, 8), activation="tanh", zero_last=False, **kwargs
    )
    return Autoregressive(scalar_map, net).double()


@pytest.mark.parametrize("scalar_map", MAPS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize(
    "kwargs", [{}, {"order": "reverse"}, {"passes": 2}, {"residual": True}], ids=str
)
def test_both_directions_and_their_jacobians(scalar_map, context_features, kwargs):
    transform = build(scalar_map, context_features=context_features, **kwargs)
    for batch in BATCHES:
        z = torch.randn(*batch, 4).double()
        context = torch.randn(*batch, context_features).double() if context_features else None
        x, log_det, costs = transform(z, context)
        back = transform.inverse(x, context)
        assert x.shape == z.shape
        assert log_det.shape == back.log_det.shape == batch
        assert costs == back.costs == {}
        torch.testing.assert_close(back.value, z, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(back.log_det, -log_det, atol=1e-9, rtol=1e-9)
        if batch == ():
            for function, point, expected in [
                (transform.forward, z, log_det),
                (transform.inverse, x, back.log_det),
            ]:
                matrix = jacobian(lambda v, f=function, c=context: f(v, c).value, point)
                torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, expected)


def test_the_first_feature_alone_follows_its_scalar_map():
    transform = build(Affine())
    z = torch.randn(6, 4).double()
    x = transform(z).value
    shift, log_scale = transform.made(x)[..., 0, :].unbind(-1)
    torch.testing.assert_close(x[:, 0], z[:, 0] * log_scale.exp() + shift)
    assert (shift == shift[0]).all()


def test_inverted_it_samples_in_parallel():
    flow = Inverse(build(RationalQuadratic(bins=4)))
    z = torch.randn(6, 4).double()
    x, log_det, _ = flow(z)
    torch.testing.assert_close(flow.inverse(x).value, z)
    torch.testing.assert_close(x, flow.part.inverse(z).value)
    torch.testing.assert_close(log_det, flow.part.inverse(z).log_det)


def test_a_deep_chain_in_float32():
    spline = RationalQuadratic(bins=8)
    chain = Chain(
        Autoregressive(
            spline, MADE(43, spline.size, zero_last=False, order="reverse" if i % 2 else None)
        )
        for i in range(3)
    )
    z = torch.randn(64, 43)
    with torch.no_grad():
        x, log_det, _ = chain(z)
        back = chain.inverse(x)
    assert x.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(back.value, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back.log_det, -log_det, atol=1e-3, rtol=1e-4)


def test_gradients_of_both_directions():
    transform = build(RationalQuadratic(bins=4), context_features=2)
    z = torch.randn(3, 4).double().requires_grad_()
    context = torch.randn(3, 2).double().requires_grad_()
    for function in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(lambda v, c, f=function: f(v, c)[:2], (z, context))
        mapped = function(z, context)
        loss = mapped.value.sum() + mapped.log_det.sum()
        grads = torch.autograd.grad(loss, list(transform.parameters()))
        assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_tape_the_numbers_are_the_same(mode):
    transform = build(RationalQuadratic(bins=4))
    z = torch.randn(5, 4).double()
    with mode():
        x, log_det, _ = transform(z)
    torch.testing.assert_close((x, log_det), transform(z)[:2])


def test_a_scalar_map_may_return_what_it_was_given():
    class Exponential(ScalarMap):
        """x = exp(z) + b, whose log-derivative is z."""

        size = 1

        def forward(self, z, parameters):
            return torch.exp(z) + parameters[..., 0], z

        def inverse(self, x, parameters):
            z = torch.log(x - parameters[..., 0])
            return z, -z

    transform, z = build(Exponential()), torch.randn(6, 4).double()
    with torch.no_grad():
        log_det = transform(z).log_det
    torch.testing.assert_close(log_det, transform(z).log_det)


def test_starts_as_the_identity_and_learns():
    transform = Autoregressive(Affine(), MADE(3, 2))
    z = torch.randn(5, 3)
    x, log_det, _ = transform(z)
    assert torch.equal(x, z)
    assert (log_det == 0).all()
    transform.inverse(z).value.square().sum().backward()
    assert transform.made.layers[-1].weight.grad.abs().sum() > 0


def test_one_feature_with_a_context():
    transform = build(Affine(), features=1, context_features=2)
    z, context = torch.randn(5, 1).double(), torch.randn(5, 2).double()
    x = transform(z, context).value
    torch.testing.assert_close(transform.inverse(x, context).value, z)
    assert not torch.allclose(x, transform(z, context + 1).value)


def test_copies_agree():
    transform = build(Affine(), order="random")
    z = torch.randn(5, 4).double()
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(twin(z).value, transform(z).value)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"build it as MADE\(features, 2\)"):
        Autoregressive(Affine(), MADE(3, 5))
    transform = Autoregressive(Affine(), MADE(3, 2))
    for function in (transform.forward, transform.inverse):
        with pytest.raises(ValueError, match="built for 3 features"):
            function(torch.randn(5, 4))


def test_its_repr_says_what_it_is():
    text = repr(Autoregressive(Affine(), MADE(3, 2)))
    assert "Affine" in text
    assert "passes=3" in text


@pytest.mark.parametrize("name", ["maf", "iaf"])
def test_what_a_flow_returns_lies_row_by_row_however_it_was_found(name):
    flow, x = cnf.models[name].build(5, layers=3, hidden=(8,)), torch.randn(3, 2, 5)
    with torch.no_grad():
        draws = flow.sample((3, 2)), flow.sample_and_log_prob((3, 2))[0], flow.decode(x)
        for values in (*draws, flow.encode(x), flow.evaluate(x).z):
            assert values.shape == x.shape
            assert values.is_contiguous()
        alone = flow.transform.forward(x, None, Request(log_det=False))
        assert torch.equal(alone.value, flow.decode(x))
