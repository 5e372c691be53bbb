"""Same weights, same numbers: flows of zuko and nflows, taken over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnf
from cnf.importers import from_nflows, from_zuko
from cnf.importers.weights import ImportedFlowError

F64 = torch.float64


def shaken(module: nn.Module, spread: float = 0.3) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter += spread * torch.randn_like(parameter)
    return module.double().eval()


def points(features: int, n: int = 200) -> torch.Tensor:
    return 2 * torch.randn(n, features, generator=torch.Generator().manual_seed(1), dtype=F64)


def agree(ours: cnf.Flow, expected: torch.Tensor, x: torch.Tensor, context=None) -> None:
    assert ours.dtype == F64
    torch.testing.assert_close(ours.log_prob(x, context), expected, atol=1e-8, rtol=1e-8)
    z = ours.encode(x, context)
    torch.testing.assert_close(ours.decode(z, context), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["MAF", "NSF"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context": 2},
        {"randperm": True, "activation": nn.ELU},
        {"passes": 2},
        {"passes": 3, "context": 1, "hidden_features": (12,)},
        {"hidden_features": (3, 3)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_zuko(name, options):
    zuko = pytest.importorskip("zuko")
    options = {"transforms": 3, "hidden_features": (16, 16), **options}
    theirs = shaken(getattr(zuko.flows, name)(5, **options))
    x = points(5)
    context = None
    if options.get("context"):
        context = points(options["context"])
    agree(from_zuko(theirs), theirs(context).log_prob(x), x, context)


def test_zuko_says_what_it_cannot_take():
    zuko = pytest.importorskip("zuko")
    with pytest.raises(ImportedFlowError, match="ElementWiseTransform cannot be taken over"):
        from_zuko(zuko.flows.GF(3))
    with pytest.raises(ImportedFlowError, match="CircularRQSTransform"):
        from_zuko(zuko.flows.NCSF(3))
    with pytest.raises(ImportedFlowError, match="Linear cannot be taken over"):
        from_zuko(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_residual_blocks": False},
        {"use_random_permutations": True, "activation": torch.tanh},
        {"batch_norm_between_layers": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_nflows_maf(options):
    flows = pytest.importorskip("nflows.flows")
    theirs = flows.MaskedAutoregressiveFlow(5, 13, 3, 2, **options)
    theirs = shaken(trained(theirs), 0.1)
    agree(from_nflows(theirs), theirs.log_prob(points(5)), points(5))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_volume_preserving": True}, {"batch_norm_between_layers": True}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_nflows_realnvp(options):
    flows = pytest.importorskip("nflows.flows")
    theirs = shaken(trained(flows.SimpleRealNVP(5, 13, 4, 2, **options)), 0.1)
    agree(from_nflows(theirs), theirs.log_prob(points(5)), points(5))


@pytest.mark.parametrize("autoregressive", [False, True])
def test_nflows_spline(autoregressive):
    transforms = pytest.importorskip("nflows.transforms")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    parts = []
    for _ in range(2):
        parts += [transforms.RandomPermutation(4), transforms.LULinear(4)]
        if autoregressive:
            spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            parts.append(spline(4, 12, num_bins=5, tails="linear", tail_bound=3.0))
        else:
            spline = transforms.PiecewiseRationalQuadraticCouplingTransform
            net = lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=12)  # noqa: E731
            parts.append(spline([1, 0, 1, 0], net, num_bins=5, tails="linear", tail_bound=3.0))
    theirs = shaken(Flow(transforms.CompositeTransform(parts), StandardNormal([4])))
    agree(from_nflows(theirs), theirs.log_prob(points(4)), points(4))


def test_nflows_says_what_it_cannot_take():
    flows = pytest.importorskip("nflows.flows")
    with pytest.raises(ImportedFlowError, match="batch normalisation"):
        from_nflows(flows.SimpleRealNVP(3, 8, 2, 1, batch_norm_within_layers=True))
    with pytest.raises(ImportedFlowError, match="Linear cannot be taken over"):
        from_nflows(nn.Linear(3, 3))
    with pytest.raises(ImportedFlowError, match="random masks"):
        from_nflows(
            flows.MaskedAutoregressiveFlow(
                5, 8, 2, 1, use_residual_blocks=False, use_random_masks=True
            )
        )


def test_imported_weights_are_kept_when_fitted():
    flows = pytest.importorskip("nflows.flows")
    ours = from_nflows(flows.MaskedAutoregressiveFlow(2, 8, 2, 1))
    before = ours.log_prob(torch.zeros(2))
    cnf.fit(ours, torch.randn(64, 2) * 5, steps=1, lr=1e-9, seed=0)
    torch.testing.assert_close(ours.log_prob(torch.zeros(2)), before, atol=1e-5, rtol=1e-5)


def trained(flow: nn.Module) -> nn.Module:
    """Let batch normalisation see data."""
    with torch.no_grad():
        for _ in range(3):
            flow.log_prob(points(5).float())
    return flow
