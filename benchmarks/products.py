"""What a layer of few inputs costs to train, by torch's products and by ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torchs

from benchmarks import harness
from cnf.nets.products import linear as ours

BATCH, WIDTH = 512, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inputs", type=harness.count, nargs="+", default=(1, 2, 4, 8, 12, 16, 43, 64)
    )
    parser.add_argument("--batch", type=harness.count, default=BATCH)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    rows = []
    for inputs in options.inputs:
        entrants = {"torch's": _call(torchs, inputs, options.batch)}
        entrants["ours"] = _call(ours, inputs, options.batch)
        plain, own = harness.race(entrants, "torch's", rounds=50, warmup=20)
        rows.append(
            {"inputs": inputs, "torch's, ms": plain.ms, "ours, ms": own.ms, "×": own.speedup}
        )
    note = (
        f"{options.batch} points through a layer of {WIDTH} units: value and all gradients, "
        "float32; `×` is the median over rounds."
    )
    harness.write("products", [harness.table("layers of few inputs", rows, note)], options.out)


def _call(
    linear: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: int, batch: int
) -> Callable[[], Any]:
    x = torch.randn(batch, inputs, requires_grad=True)
    weight = torch.randn(WIDTH, inputs, requires_grad=True)
    bias = torch.randn(WIDTH, requires_grad=True)
    gradient = torch.randn(batch, WIDTH)
    return lambda: torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), gradient)
