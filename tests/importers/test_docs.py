"""The page on coming from other packages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(code):
    for package in ("zuko", "nflows"):
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package)
    exec(compile(code, str(PAGE), "exec"), {})
