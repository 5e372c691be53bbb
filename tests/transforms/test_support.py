"""Densities on bounded supports, against those that are known there."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Dirichlet, LogNormal

import cnf
from cnf.registry import UnknownNameError
from cnf.transforms import Interval, Permutation, Simplex, SupportedStandardize, as_support

F64 = torch.float64
SUPPORTS = {
    "positive": ("positive", (3,)),
    "unit interval": ("interval", (3,)),
    "interval": ((-2.0, 5.0), (3,)),
    "half line": ((-2.0, math.inf), (3,)),
    "simplex": ("simplex", (4,)),
}
OUTSIDE = {
    "positive": [[1.0, -1.0, 2.0], [1.0, 0.0, 2.0], [1.0, -math.inf, 2.0]],
    "unit interval": [[0.5, 7.0, 0.5], [0.5, -7.0, 0.5], [0.5, 1.0, 0.5], [0.5, 0.0, 0.5]],
    "interval": [[0.0, 6.0, 0.0], [0.0, 5.0, 0.0], [-2.0, 0.0, 0.0]],
    "half line": [[0.0, -2.0, 0.0], [0.0, -2.5, 0.0]],
    "simplex": [[0.5, 0.5, 0.5, -0.5], [0.5, 0.5, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]],
}
every = pytest.mark.parametrize("name", SUPPORTS)


def points(*shape: int, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def inside(name, *batch, dtype=F64):
    support, event = SUPPORTS[name]
    transform = as_support(support, event)
    return transform(points(*batch, *transform.latent_shape(event), dtype=dtype)).value


@every
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_inverse_undoes_forward(name, batch, dtype):
    support, event = SUPPORTS[name]
    transform = as_support(support, event)
    z = points(*batch, *transform.latent_shape(event), dtype=dtype)
    there = transform(z)
    back = transform.inverse(there.value)
    assert there.value.shape == (*batch, *event)
    assert there.log_det.shape == batch
    if there.value.numel():  # torch does not check what is empty
        assert transform.constraint.check(there.value).all()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(back.value, z, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(back.log_det, -there.log_det, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "support",
    ["positive", "interval", "simplex", (-1e6, 0.0), (0.1, 0.7), (1e3, 1e3 + 1), (5.0, math.inf)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_what_lies_far_out_stays_inside(support, dtype):
    transform = as_support(support, (3,))
    z = torch.tensor([-1e3, -100, -20, 0, 20, 100, 1e3], dtype=dtype)
    z = z[:, None].expand(7, transform.latent_shape((3,))[0])
    x, log_det, _ = transform(z)
    assert x.isfinite().all()
    assert log_det.isfinite().all()
    assert transform.constraint.check(x).all()
    assert transform.inverse(x).log_det.isfinite().all()
    if isinstance(support, tuple):
        ends = torch.tensor(support, dtype=dtype)[:, None].expand(2, 3)
        assert transform.inverse(ends).log_det.isneginf().all()


@every
def test_log_det_is_the_jacobians(name):
    support, event = SUPPORTS[name]
    transform = as_support(support, event)
    z = points(3)  # a simplex is described by all entries but the last
    jacobian = torch.autograd.functional.jacobian(lambda z: transform(z).value[:3], z)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform(z).log_det, expected)


@every
@pytest.mark.parametrize("model", ["ffjord", "rnode", "otflow"])
def test_outside_the_density_is_zero(name, model):
    support, event = SUPPORTS[name]
    torch.manual_seed(0)
    flow = cnf.models[model].build(event[0], support=support).double()
    flow.standardize(inside(name, 50))
    good, bad = inside(name, 3), torch.tensor(OUTSIDE[name], dtype=F64)
    x = torch.cat([bad, good]).requires_grad_()
    log_prob = flow.log_prob(x)
    assert (log_prob[: len(bad)] == -math.inf).all()
    assert log_prob[len(bad) :].isfinite().all()
    (gradient,) = torch.autograd.grad(log_prob[len(bad) :].sum(), x)
    assert gradient.isfinite().all()
    torch.testing.assert_close(flow.log_prob(good), log_prob[len(bad) :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", [*cnf.models])
def test_every_model_of_vectors_takes_a_support(model, tmp_path):
    name = "simplex"
    support, event = SUPPORTS[name]
    torch.manual_seed(0)
    if model == "ncsf":
        with pytest.raises(ValueError, match="angles"):
            cnf.ncsf(event[0], support=support)
        return
    flow = cnf.models[model].build(event[0], support=support)
    x = inside(name, 4).float()
    flow.standardize(inside(name, 50).float())
    log_prob = flow.log_prob(x)
    assert log_prob.isfinite().all()
    assert flow.log_prob(torch.tensor(OUTSIDE[name])).isneginf().all()
    assert flow.sample((3,)).shape == (3, *event)
    flow.save(tmp_path)
    assert torch.equal(cnf.load(tmp_path).log_prob(x), log_prob)


@every
def test_a_flow_lives_in_its_support(name, tmp_path):
    support, event = SUPPORTS[name]
    torch.manual_seed(0)
    solver = cnf.Solver(rtol=1e-9, atol=1e-9)
    flow = cnf.ffjord(event[0], hidden=(8,), support=support, solver=solver).double()
    data = inside(name, 50)
    flow.standardize(data)
    generator = torch.Generator().manual_seed(0)
    x, log_prob = flow.sample_and_log_prob((20,), request=cnf.Request(generator=generator))
    constraint = flow.distribution().support
    assert x.shape == (20, *event)
    assert constraint.check(x).all()
    assert not constraint.check(torch.tensor(OUTSIDE[name][0], dtype=F64)).all()
    torch.testing.assert_close(flow.log_prob(x), log_prob, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, atol=1e-6, rtol=1e-6)
    beyond = torch.tensor(OUTSIDE[name], dtype=F64)
    torch.testing.assert_close(flow.encode(beyond), flow.evaluate(beyond).z, atol=1e-6, rtol=1e-6)
    _, path = flow.trajectory(flow.encode(x), [0.0, 0.5, 1.0])
    assert path.shape == (3, 20, *event)
    torch.testing.assert_close(path[-1], x, atol=1e-6, rtol=1e-6)
    behind = flow.scaling.inverse(data).value
    torch.testing.assert_close(behind.mean(0), torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
    flow.save(tmp_path)
    assert torch.equal(cnf.load(tmp_path).log_prob(x), flow.log_prob(x))


def identity(support, event):
    size = support.latent_shape(event)[0]
    transform, base = Permutation(list(range(size))), cnf.Normal(size)
    return cnf.Flow(transform, base, event_shape=event, support=support).double()


def test_a_normal_behind_the_exponential_is_log_normal():
    flow, x = identity(Interval((2,)), (2,)), points(5, 2).exp()
    expected = LogNormal(torch.zeros(2, dtype=F64), 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_a_density_on_an_interval_integrates_to_one():
    flow = identity(Interval((1,), 1.0, 4.0), (1,))
    grid = torch.linspace(1, 4, 100_001, dtype=F64).unsqueeze(-1)
    assert abs(float(flow.log_prob(grid).exp().sum()) * 3e-5 - 1) < 1e-6


def test_a_simplex_is_measured_as_dirichlets_are():
    x = Dirichlet(torch.full((3,), 5.0, dtype=F64)).sample((200_000,))
    flow = identity(Simplex(3), (3,))
    flow.standardize(x)
    # E_p[q / p] is one when both are densities with respect to the same measure
    ratio = (flow.log_prob(x) - Dirichlet(torch.full((3,), 5.0, dtype=F64)).log_prob(x)).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def test_data_outside_is_refused_by_fit():
    flow = cnf.ffjord(3, support="positive")
    with pytest.raises(ValueError, match=r"2 of 4 samples lie outside of the flow's support"):
        flow.standardize(torch.tensor([[1.0, 1, 1], [0, 1, 1], [2, 2, 2], [-1, 1, 1]]))


def test_gradients_reach_the_parameters_from_a_bounded_density():
    torch.manual_seed(0)
    flow = cnf.ffjord(3, hidden=(8,), support="simplex")
    flow.log_prob(torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.2, 0.2]]))[0].backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_arguments_are_checked():
    with pytest.raises(UnknownNameError, match="Did you mean 'simplex'"):
        cnf.ffjord(3, support="simplx")
    for build, match in (
        (lambda: cnf.ffjord(2, support=(3.0, 1.0)), r"got \(3.0, 1.0\)"),
        (lambda: cnf.ffjord(2, support=(-math.inf, 1.0)), "model -x"),
        (lambda: cnf.ffjord(1, support="simplex"), "at least 2 entries"),
        (lambda: cnf.ffjord((1, 2, 2), support="simplex"), "one of vectors"),
        (lambda: cnf.ffjord(2, support="positive", dequantize="uniform"), "integers have no"),
        (lambda: Simplex(3).latent_shape((4,)), "has 3 entries"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    assert isinstance(cnf.ffjord(2, support="positive").scaling, SupportedStandardize)
    assert as_support(None, (2,)) is None
