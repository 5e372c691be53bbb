from __future__ import annotations

import math

import pytest
import torch

import cnf
from cnf.objectives import Batch, ReverseKL
from cnf.transforms import Chain, Diagonal, Elementwise, Triangular


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(x):
    """A Gaussian of scales 2 and ½, without its normaliser log(2π · 2 · ½)."""
    return 0.5 * (x / torch.tensor([2.0, 0.5], dtype=x.dtype)).square().sum(-1)


def test_the_loss_is_the_known_kl_up_to_the_normaliser():
    flow = cnf.Flow(Diagonal(2, scale=3.0), cnf.Normal(2)).double()
    loss = ReverseKL(flow, gaussian, samples=200_000)(generator=generator())
    kl = sum(math.log(s / 3) + 0.5 * (9 / s**2 - 1) for s in (2.0, 0.5))
    assert loss.total.item() == pytest.approx(kl - math.log(2 * math.pi), rel=0.01)
    assert loss.terms["entropy"].item() == pytest.approx(
        math.log(2 * math.pi) + 1 + 2 * math.log(3), abs=0.01
    )
    parts = loss.terms["energy"] - loss.terms["entropy"]
    torch.testing.assert_close(parts, loss.terms["reverse kl"])


def test_a_sheared_gaussian_is_fitted_to_its_normaliser():
    torch.manual_seed(0)
    flow = cnf.Flow(Chain([Triangular(2), Diagonal(2)]), cnf.Normal(2)).double()
    target = cnf.data.energy("gaussian")
    objective = ReverseKL(flow, target, samples=128)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    noise = generator()
    for _ in range(300):
        optimizer.zero_grad()
        objective(generator=noise).total.backward()
        optimizer.step()
        decay.step()
    left = objective(generator=noise).total.item() + target.log_normalizer
    assert left == pytest.approx(0.0, abs=1e-3)
    assert cnf.kl(flow, target, 1000, generator=noise).value == pytest.approx(0.0, abs=1e-3)


def test_gradients_pass_through_a_continuous_flow():
    flow = cnf.ffjord(2, hidden=(8,))
    loss = ReverseKL(flow, cnf.data.energy("ring"), samples=16)(generator=generator())
    loss.total.backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_conditional_flow_is_fitted_at_the_contexts_of_the_batch():
    flow = cnf.Flow(
        Elementwise(cnf.bijections.Affine(), (1,), cnf.nets.MLP(2, 2, hidden=(8,))),
        cnf.Normal(1),
        context_features=2,
    )
    seen = []

    def energy(x, context):
        seen.append((x.shape, context.shape))
        return (x - context[:, :1]).square().sum(-1)

    batch = Batch(torch.zeros(5, 1), torch.randn(5, 2))
    ReverseKL(flow, energy, samples=3)(batch).total.backward()
    assert seen == [((3, 5, 1), (5, 2))]


def test_an_energy_of_the_wrong_shape_is_refused():
    flow = cnf.Flow(Diagonal(2), cnf.Normal(2))
    with pytest.raises(ValueError, match=r"one number per sample, \(256,\)"):
        ReverseKL(flow, lambda x: x)()
    with pytest.raises(ValueError, match="samples must be at least 1"):
        ReverseKL(flow, gaussian, samples=0)
