"""What tanh costs beside a matrix product, as the compiler makes it and as ours is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from cnf.tanh import quick_tanh, rational_tanh

BATCH, WIDTH = 512, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    h = 2 * torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    points = torch.linspace(-10, 10, BATCH * WIDTH).view(BATCH, WIDTH)
    truth = torch.tanh(points.double())
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.tanh": torch.tanh,
        "NumPy's": torch.no_grad()(quick_tanh),
        "torch.tanh, compiled": torch.compile(lambda h: torch.tanh(h)),
        "rational, compiled": torch.compile(lambda h: rational_tanh(h)),
        "negative, compiled": torch.compile(lambda h: -h),
    }
    product = f"product with {WIDTH} x {WIDTH}"
    entrants: dict[str, Callable[[], object]] = {product: lambda: h @ weight}
    entrants |= {name: lambda call=call: call(h) for name, call in functions.items()}
    errors = {
        name: float((call(points).double() - truth).abs().max())
        for name, call in functions.items()
        if "negative" not in name
    }
    rows = harness.race(entrants, product, rounds=50)
    note = (
        f"{BATCH} x {WIDTH} float32 numbers; `speedup` against the product. The negative is what "
        "calling compiled code and writing its result cost anyway. Error: the largest on [-10, 10]."
    )
    cells = [{**row.cells(), "error": errors.get(row.name)} for row in rows]
    harness.write("tanh", [harness.table("tanh", cells, note)], options.out)
