"""The measurements' tools: fair turns, tables, and peers that compute the same."""

import json
import time

import pytest

from benchmarks import harness


def test_a_race_ranks_by_time():
    entrants = {"slow": lambda: time.sleep(0.012), "fast": lambda: time.sleep(0.006)}
    slow, fast = harness.race(entrants, "slow", rounds=5, warmup=1)
    assert (slow.speedup, slow.name) == (1.0, "slow")
    assert fast.speedup > 1.2
    assert fast.low <= fast.speedup <= fast.high
    assert fast.ms >= 6


def test_a_race_takes_everyone_in_turn():
    calls = []
    entrants = {name: lambda name=name: (calls.append(name), time.sleep(0.006)) for name in "abc"}
    harness.race(entrants, "a", rounds=4, warmup=1)
    timed = calls[-12:]
    assert all(sorted(timed[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
    assert {timed[i] for i in range(0, 12, 3)} == {"a", "b", "c"}


def test_a_race_needs_its_reference():
    with pytest.raises(ValueError, match="the reference 'x' is none of a, b"):
        harness.race({"a": time.time, "b": time.time}, "x")


def test_results_are_written_as_json_and_markdown(tmp_path):
    row = harness.Row("ours", 1.5, 2.0, 1.9, 2.1, 10)
    tables = [
        harness.table("Steps", [row], "One core."),
        harness.table("Errors", [{"": "a", "error": 1e-5}, {"": "b", "nats": 0.25}]),
    ]
    page = harness.write("check", tables, tmp_path).read_text()
    assert "| ours | 1.50 | 2.00 | 1.90 to 2.10 |" in page
    assert "| a | 1.0e-05 | – |" in page
    assert "| b | – | 0.250 |" in page
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["tables"][0]["rows"][0]["speedup"] == 2.0
    assert found["machine"]["threads"] >= 1


def test_peers_that_are_missing_are_said(capsys):
    assert harness.installed("torch")
    assert not harness.installed("torch", "no_such_package")
    assert "no_such_package not installed" in capsys.readouterr().out
