from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_draws_its_picture(script, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--quick", "--out", str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    pictures = list((tmp_path / "out").rglob("*.png"))
    assert pictures
    assert str(pictures[0].parent) in capsys.readouterr().out
