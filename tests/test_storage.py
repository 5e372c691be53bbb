"""Saving and loading beyond what the laws cover: by hand, damaged, or from another version."""

from __future__ import annotations

import json

import pytest
import torch

import cnf
from cnf.transforms import Chain, Diagonal, Rotation


def by_hand() -> cnf.Flow:
    return cnf.Flow(Chain([Diagonal(2), Rotation(2, 0.3)]), cnf.Normal(2))


def test_a_flow_put_together_by_hand_saves_its_numbers(tmp_path):
    flow, x = by_hand(), torch.randn(5, 2)
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    with pytest.raises(TypeError, match=r"recipe=False.*into=flow"):
        flow.save(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    flow.save(tmp_path, recipe=False)
    with pytest.raises(cnf.LoadError, match=r"flow\.json is missing: .*into=flow"):
        cnf.load(tmp_path)
    assert torch.equal(cnf.load(tmp_path, into=by_hand()).log_prob(x), flow.log_prob(x))


def test_an_exchanged_part_is_refused(tmp_path):
    flow = cnf.realnvp(2)
    flow.base = cnf.Normal(2, trainable=True)
    with pytest.raises(TypeError, match=r"no longer what cnf\.realnvp built"):
        flow.save(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float99"},
        {"builder": "nobody"},
        {"arguments": {"no_such": 1}},
        {"format": 99},
        {"arguments": {"features": {"record": "Nothing", "fields": {}}}},
    ],
    ids=str,
)
def test_what_cannot_be_built_says_so(tmp_path, change):
    cnf.nice(2, layers=2).save(tmp_path)
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(cnf.LoadError, match=r"flow\.json"):
        cnf.load(tmp_path)


def test_damaged_and_foreign_folders_say_so(tmp_path):
    with pytest.raises(cnf.LoadError, match=r"holds no flow\.safetensors"):
        cnf.load(tmp_path)
    cnf.nice(2, layers=2).save(tmp_path)
    with pytest.raises(cnf.LoadError, match="does not fit"):
        cnf.load(tmp_path, into=cnf.nice(3, layers=2))
    (tmp_path / "flow.json").write_text("{")
    with pytest.raises(cnf.LoadError, match="damaged"):
        cnf.load(tmp_path)
    (tmp_path / "flow.safetensors").write_bytes(b"nonsense")
    with pytest.raises(cnf.LoadError, match="does not fit"):
        cnf.load(tmp_path, into=cnf.nice(2, layers=2))
