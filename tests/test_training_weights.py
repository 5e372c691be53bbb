"""Rows that count unequally: a weight of two is the row twice, a weight of zero is no row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import cnf
from cnf.training.data import Shape, as_rows
from cnf.training.validation import Validator

GENERATOR = torch.Generator()


def rows_and_weights(count: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator) * torch.tensor([1.0, 3.0]) + 2
    return x, torch.randint(0, 4, (count,), generator=generator).float()


def shape() -> Shape:
    return Shape((2,), 0, torch.empty(0))


class Points(Dataset):
    """Rows that are read one by one."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


@pytest.mark.parametrize("model", ["realnvp", "ffjord"])
def test_a_weighted_loss_is_that_of_repeated_rows(model):
    x, weights = rows_and_weights()
    flow = cnf.models[model].build(2, hidden=(8,))
    objective = cnf.MaximumLikelihood(flow, tolerance=1e-5)
    rows = as_rows(x, None, shape(), GENERATOR, 0, weights)
    weighted = objective(rows.batch(torch.arange(len(rows)))).total
    repeated = objective(cnf.Batch(x.repeat_interleave(weights.long(), 0))).total
    torch.testing.assert_close(weighted, repeated, rtol=1e-5, atol=0)


def test_weighted_likelihood_has_the_weighted_moments():
    x, weights = rows_and_weights(2000)
    flow = cnf.nice(2, layers=1, hidden=(1,))
    cnf.fit(flow, x, weights=weights, validation=x, steps=1)
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    torch.testing.assert_close(flow.scaling.loc, mean, atol=0.3, rtol=0)
    # what is not weighted would be seen: these weights follow the second feature
    tilted = torch.exp(x[:, 1] / 3)
    cnf.fit(flow, x, weights=tilted, validation=x, steps=1, initialize=True)
    mean = (tilted[:, None] * x).sum(0) / tilted.sum()
    assert mean[1] > x[:, 1].mean() + 2
    torch.testing.assert_close(flow.scaling.loc, mean, atol=0.5, rtol=0)


def test_validation_is_weighted():
    x, weights = rows_and_weights()
    flow = cnf.realnvp(2, layers=2)
    expected = -(flow.log_prob(x).double() * weights).sum() / weights.sum()
    found = Validator(cnf.Batch(x, None, weights)).nats(flow)
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_keep_their_weights_in_any_order(streamed, monkeypatch):
    if streamed:
        monkeypatch.setattr("cnf.training.data.IN_MEMORY", 100)
    x, weights = rows_and_weights()
    rows = as_rows(Points(x), None, shape(), GENERATOR, 0, weights.numpy())
    assert len(rows) == int((weights > 0).sum())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    part = rows.subset(order[:50]).batch(torch.tensor([7, 3]))
    kept = weights.nonzero().squeeze(-1)[order[[7, 3]]]
    assert torch.equal(part.x, x[kept])
    assert torch.equal(part.weight, weights[kept])


def test_a_batch_brings_its_weights():
    x, weights = rows_and_weights()
    given, brought = cnf.realnvp(2, layers=2), cnf.realnvp(2, layers=2)
    brought.load_state_dict(given.state_dict())
    cnf.fit(given, x, weights=weights, steps=5)
    cnf.fit(brought, cnf.Batch(x, None, weights), steps=5)
    for a, b in zip(given.parameters(), brought.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(299), r"weights must have shape \(300,\), one for each row"),
        (torch.ones(300, 1), r"weights must have shape \(300,\)"),
        (np.zeros(300), "must not be negative nor all zero, got 0 to 0"),
        (-torch.ones(300), "must not be negative nor all zero, got -1 to -1"),
        (np.full(300, np.nan), "the column of weights has missing or infinite values"),
    ],
)
def test_senseless_weights_are_refused(weights, message):
    x, _ = rows_and_weights()
    with pytest.raises(ValueError, match=message):
        cnf.fit(cnf.realnvp(2, layers=2), x, weights=weights, steps=1)


def test_weights_come_once():
    x, weights = rows_and_weights()
    flow = cnf.realnvp(2, layers=2)
    with pytest.raises(ValueError, match="the batch brings its own weights"):
        cnf.fit(flow, cnf.Batch(x, None, weights), weights=weights, steps=1)
    with pytest.raises(ValueError, match="a target's samples have no weights"):
        cnf.fit(flow, cnf.data.toy("moons"), weights=weights, steps=1)
