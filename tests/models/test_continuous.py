"""Ready-made continuous flows: what their arguments build, and how they are trained."""

from __future__ import annotations

import pytest
import torch

import cnf
from cnf.costs import HJBResidual, JacobianNorm, KineticEnergy
from cnf.nets import ConditionedMLP, ConvField, PotentialField, ResidualField, TimeMLP
from cnf.objectives import build_objective
from cnf.registry import MODELS, UnknownNameError
from cnf.transforms import ActNorm, BatchNorm, Chain, Continuous, Multiscale

FAST = cnf.Solver("rk4", step_size=0.25)


def test_fields_by_argument():
    for arguments, kind in (
        ({}, TimeMLP),
        ({"context_features": 2}, TimeMLP),
        ({"context_features": 2, "context_by": "lowrank"}, ConditionedMLP),
        ({"field": "residual"}, ResidualField),
    ):
        assert type(cnf.ffjord(3, **arguments).transform.field) is kind
    assert isinstance(cnf.ffjord((1, 4, 4)).transform.field, ConvField)
    assert isinstance(cnf.otflow(3).transform.field, PotentialField)
    assert len(cnf.ffjord(3, hidden=(8, 8), field="residual").transform.field.blocks) == 2


@pytest.mark.parametrize(
    ("normalization", "kind"), [("actnorm", ActNorm), ("batchnorm", BatchNorm)]
)
def test_blocks_are_normalised(normalization, kind):
    torch.manual_seed(0)
    flow = cnf.ffjord(2, hidden=(8,), blocks=2, normalization=normalization, solver=FAST)
    assert [type(part) for part in flow.transform] == [Continuous, kind, Continuous, kind]
    x = 5 + 3 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    flow.initialize(x)
    last = flow.transform[-1].eval()
    torch.testing.assert_close(last.inverse(x).value.mean(0), torch.zeros(2), atol=1e-4, rtol=0)


def test_levels_of_an_image():
    flow = cnf.ffjord((2, 4, 4), hidden=(3,), blocks=2, levels=2, solver=FAST)
    assert isinstance(flow.transform, Multiscale)
    with cnf.count_nfe() as nfe:
        assert flow.log_prob(torch.zeros(3, 2, 4, 4)).shape == (3,)
    # two blocks before and two after the squeeze, then two on the level below
    assert nfe.solves == 6


def test_images_of_integers_have_a_bound():
    torch.manual_seed(0)
    flow = cnf.ffjord(
        (1, 4, 4), hidden=(3,), dequantize="uniform", bins=4, strides=(2, -2), solver=FAST
    )
    x = torch.randint(0, 4, (5, 1, 4, 4)).float()
    flow.initialize(x)
    request = cnf.Request(generator=torch.Generator().manual_seed(0))
    assert (flow.evaluate(x, request=request).log_prob < 0).all()
    assert (flow.sample((3,)) % 1 == 0).all()
    assert flow.log_prob(x + 0.5).isneginf().all()


def test_an_estimated_trace_may_be_the_models_own(tmp_path):
    flow = cnf.ffjord(2, hidden=(8,), divergence=cnf.HutchPlusPlus(2, 1))
    assert not flow.transform.exact
    flow.save(tmp_path)
    assert cnf.load(tmp_path).transform.divergence == cnf.HutchPlusPlus(2, 1)


def test_objectives_of_the_papers():
    rnode = build_objective(MODELS["rnode"].objective, cnf.rnode(2))
    assert rnode.costs == {KineticEnergy(): 0.01, JacobianNorm(): 0.01}
    assert rnode.divergence is None
    image = build_objective("rnode", cnf.rnode((1, 2, 2)))
    assert image.divergence == cnf.Hutchinson()
    otflow = build_objective(MODELS["otflow"].objective, cnf.otflow(2))
    assert otflow.costs == {KineticEnergy(): 0.005, HJBResidual(): 0.05}
    assert cnf.rnode(2).recipe.builder == "rnode"


@pytest.mark.parametrize("name", ["rnode", "otflow"])
def test_papers_train(name):
    torch.manual_seed(0)
    flow = MODELS[name].build(2, solver=cnf.Solver("rk4", step_size=0.25, gradient="backprop"))
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.5])
    history = cnf.fit(flow, x, steps=20, batch_size=128, seed=0)
    assert history.steps == 20
    assert flow.log_prob(x).isfinite().all()


def test_otflow_needs_no_probe():
    torch.manual_seed(0)
    flow, x = cnf.otflow(5).double(), torch.randn(4, 5).double()
    state = torch.get_rng_state()
    exact = flow.log_prob(x)
    assert torch.equal(torch.get_rng_state(), state)
    pushed = flow.evaluate(x, request=cnf.Request(costs=(JacobianNorm(),))).log_prob
    torch.testing.assert_close(pushed, exact, atol=1e-6, rtol=1e-6)


def test_film_scales_the_channels_of_an_images_layers():
    torch.manual_seed(0)
    flow = cnf.ffjord(
        (1, 4, 4), hidden=(3,), context_features=2, context_by="film", levels=2, solver=FAST
    )
    x, context = torch.randn(5, 1, 4, 4), torch.randn(5, 2)
    plain = flow.log_prob(x, context)
    # at first a context changes nothing
    torch.testing.assert_close(plain, flow.log_prob(x, 2 * context))
    for name, parameter in flow.named_parameters():
        if "film" in name:
            torch.nn.init.normal_(parameter)
    assert (flow.log_prob(x, context) - flow.log_prob(x, 2 * context)).abs().min() > 1e-3


def test_arguments_are_checked():
    for arguments, match in (
        ({"normalization": "act-norm"}, "Did you mean 'actnorm'"),
        ({"field": "residuals"}, "Did you mean 'residual'"),
        ({"context_features": 1, "context_by": "filmed"}, "Did you mean 'film'"),
        ({"context_by": "filmed"}, "Did you mean 'film'"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            cnf.ffjord(2, **arguments)
    with pytest.raises(UnknownNameError, match="way of conditioning images is called 'lowrank'"):
        cnf.ffjord((1, 4, 4), context_features=1, context_by="lowrank")
    with pytest.raises(TypeError, match=r"as \(64, 64\) does, got 64"):
        cnf.ffjord(2, hidden=64)
    with pytest.raises(ValueError, match="two ends"):
        cnf.ffjord(2, support=(0.0, 1.0, 2.0))
    assert cnf.bnaf(2, hidden=1).log_prob(torch.zeros(2)).isfinite()
    for features, arguments, match in (
        ((1, 2), {}, r"D or \(channels, height, width\)"),
        (2, {"levels": 2}, "are for images"),
        (2, {"strides": (2, -2)}, "are for images"),
        (2, {"field": "residual", "hidden": (8, 9)}, "one width"),
        (2, {"blocks": 0}, "blocks must be"),
        ((1, 4, 4), {"field": "residual"}, "is for vectors"),
    ):
        with pytest.raises(ValueError, match=match):
            cnf.ffjord(features, **arguments)
    with pytest.raises(ValueError, match="one of vectors"):
        cnf.otflow((1, 4, 4))
    assert isinstance(cnf.ffjord(2, blocks=2).transform, Chain)
