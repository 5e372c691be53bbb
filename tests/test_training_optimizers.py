"""What takes the steps: Muon against its definition and torch's, and how fit chooses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cnf
from cnf.objectives import FlowMatching, MaximumLikelihood
from cnf.training import budget, checkpoint
from cnf.training.muon import Muon, level, suits
from cnf.training.update import OPTIMIZERS


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 8), (2, 8, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levelled_matrices_keep_their_directions(shape, dtype):
    matrices = noise(*shape, dtype=dtype)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ level(matrices) @ vh.mT  # diagonal, where the directions are kept
    values = found.diagonal(dim1=-2, dim2=-1)
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(found, torch.diag_embed(values), **close)
    clear = s > 0.02 * torch.linalg.matrix_norm(matrices)[:, None]
    assert clear.double().mean() > 0.8
    assert values[clear].min() > 0.6
    assert values.max() < 1.3


def test_matrices_are_levelled_each_by_itself_whatever_their_size():
    matrices = noise(3, 12, 9)
    together = level(matrices * torch.tensor([1e-20, 1.0, 1e15])[:, None, None])
    for one, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(level(one[None])[0], found, rtol=1e-4, atol=1e-5)
    assert torch.equal(level(torch.zeros(1, 8, 8)), torch.zeros(1, 8, 8))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_steps_are_those_of_torch_up_to_its_rounding(shape):
    ours, theirs = nn.Parameter(noise(*shape)), nn.Parameter(noise(*shape))
    arguments = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    mine = Muon([ours], **arguments)
    other = torch.optim.Muon([theirs], **arguments)
    for step in range(5):
        ours.grad, theirs.grad = noise(*shape, seed=step), noise(*shape, seed=step)
        mine.step()
        other.step()
    moved = (theirs - noise(*shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16


def test_a_matrix_without_a_gradient_stays():
    still, moved = nn.Parameter(noise(8, 8)), nn.Parameter(noise(8, 8))
    moved.grad = noise(8, 8, seed=1)
    Muon([still, moved], lr=0.1).step()
    assert torch.equal(still, noise(8, 8))
    assert not torch.equal(moved, noise(8, 8))


def test_muon_takes_wide_matrices_and_adamw_the_rest():
    flow = cnf.ffjord(2, hidden=(16, 16), context_features=3)
    parameters = list(flow.parameters())
    adamw, muon = OPTIMIZERS["muon"](parameters, 0.1, 0.01)
    (wide,) = [p for p in parameters if p.shape == (16, 16)]
    assert muon.param_groups[0]["params"] == [wide]
    assert muon.param_groups[0]["weight_decay"] == 0.01
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in rest} == {id(p) for p in parameters if p is not wide}
    (alone,) = OPTIMIZERS["muon"]([nn.Parameter(noise(3))], 0.1, 0.0)
    assert isinstance(alone, torch.optim.AdamW)
    (alone,) = OPTIMIZERS["muon"]([nn.Parameter(noise(8, 9))], 0.1, 0.0)
    assert isinstance(alone, Muon)
    assert not suits(nn.Parameter(noise(8, 8, 8)))
    assert not suits(nn.Parameter(noise(7, 9)))


@pytest.mark.parametrize("name", ["ffjord", "realnvp", "maf", "nsf"])
def test_any_flow_can_be_trained_with_muon(name):
    x = noise(400, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.3]]) + 2
    torch.manual_seed(0)
    flow = getattr(cnf, name)(2, hidden=(16, 16))
    history = cnf.fit(flow, x, objective="likelihood", optimizer="muon", steps=30, batch_size=128)
    assert history.skipped == 0
    assert history.best_validation < history.validations[0][2]


def moments(folder):
    """The names of what a checkpoint holds of the optimisers."""
    tensors, _ = checkpoint.read(folder)
    return {name.rsplit(".", 1)[1] for name in checkpoint.unpack("optimizer", tensors)}


def test_each_objective_has_its_optimizer_and_those_after_the_first_keep_it(tmp_path):
    x = noise(200, 2)

    def train(objective, folder, **arguments):
        flow = cnf.ffjord(2, hidden=(8, 8))
        cnf.fit(
            flow, x, objective=objective, steps=4, batch_size=32, out=tmp_path / folder, **arguments
        )
        return "momentum" in moments(tmp_path / folder)

    assert train("flow-matching", "a")
    assert train(("flow-matching", "likelihood"), "b")
    assert not train("likelihood", "c")
    assert not train("flow-matching", "d", optimizer="adamw")
    assert train("likelihood", "e", optimizer="muon")


@pytest.mark.parametrize("stop", [5, 17])
def test_resuming_with_muon_continues_to_the_bit(tmp_path, stop):
    class Stopping(FlowMatching):
        calls = 0

        def forward(self, batch, *, generator=None, progress=0.0):
            self.calls += 1
            if self.calls == self.stop:
                raise KeyboardInterrupt
            return super().forward(batch, generator=generator, progress=progress)

    def train(stop, out=None, resume=False):
        torch.manual_seed(0)
        flow = cnf.ffjord(2, hidden=(8, 8))
        objective = Stopping(flow)
        objective.stop = stop
        objectives = (objective, MaximumLikelihood(flow))
        arguments = {"steps": 24, "batch_size": 32, "weight_decay": 0.01}
        cnf.fit(flow, noise(200, 2), objective=objectives, **arguments, out=out, resume=resume)
        return flow.state_dict()

    whole = train(0)
    train(stop, tmp_path)
    resumed = train(0, tmp_path, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_optimizer_is_refused(tmp_path):
    x = noise(100, 2)
    cnf.fit(cnf.realnvp(2), x, steps=2, out=tmp_path)
    with pytest.raises(ValueError, match="another optimizer: it has 'adamw', this fit has 'muon'"):
        cnf.fit(cnf.realnvp(2), x, steps=2, out=tmp_path, optimizer="muon", resume=True)
    with pytest.raises(ValueError, match="Did you mean 'muon'"):
        cnf.fit(cnf.realnvp(2), x, steps=2, optimizer="moun")


def test_the_rate_rises_over_twenty_steps_after_another_objective():
    rates = [budget.rate(0.5, warmup=0.02, schedule="constant", step=n) for n in (0, 9, 19, 500)]
    assert rates == [0.05, 0.5, 1.0, 1.0]
    early = budget.rate(0.01, warmup=0.02, schedule="cosine", step=9)
    assert early == pytest.approx(0.5 * 0.5)
    assert budget.rate(0.5, warmup=0.02, schedule="constant") == 1.0
