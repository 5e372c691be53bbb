"""The pages' examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", blocks("coming-from.md"), ids=range(3))
def test_coming_from(code):
    for package in ("zuko", "nflows"):
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package)
    exec(code, {})


def test_continuous_flows():
    # one tour, each block going on from the ones before
    exec("\n".join(blocks("continuous.md")), {"__name__": "tour"})


def test_images():
    exec("\n".join(blocks("images.md")), {})


def test_adding_a_flow():
    law = """
flow = sinh_arcsinh(2).double()
with torch.no_grad():
    for parameter in flow.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
z = torch.randn(2, dtype=torch.float64)
x, log_det, _ = flow.transform(z)
jacobian = torch.autograd.functional.jacobian(lambda z: flow.transform(z).value, z)
torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
torch.testing.assert_close(flow.transform.inverse(x).value, z)
"""
    # in a process of its own: it registers a model
    code = "\n".join([*blocks("adding-a-flow.md"), law])
    subprocess.run([sys.executable, "-c", code], check=True)
