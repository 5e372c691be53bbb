"""What a layer of few inputs costs to train, and how fast the libraries' products are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear as torchs

from benchmarks import harness
from cnf import compiling, onednn
from cnf.nets.products import linear as ours

BATCH, WIDTH = 512, 64
BATCHES = (16, 100, 512, 4096)
# products in a call, so that starting it does not count
CHAIN = 100


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
    tables = [harness.table("layers of few inputs", rows, note)]
    note = (
        f"{WIDTH} × {WIDTH} by {WIDTH} × n, float32, billions of sums and products a second: MKL "
        "and oneDNN as PyTorch calls them, code as this package compiles it (oneDNN block by "
        "block where that pays), OpenBLAS as NumPy calls it, XLA."
    )
    tables.append(harness.table("products", [*map(_rates, BATCHES)], note))
    harness.write("products", tables, options.out)


def _call(
    linear: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: int, batch: int
) -> Callable[[], Any]:
    x = torch.randn(batch, inputs, requires_grad=True)
    weight = torch.randn(WIDTH, inputs, requires_grad=True)
    bias = torch.randn(WIDTH, requires_grad=True)
    gradient = torch.randn(batch, WIDTH)
    return lambda: torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), gradient)


def _rates(batch: int) -> dict[str, Any]:
    """How many billions of operations a second each library's products are."""
    weight, values = torch.eye(WIDTH), torch.ones(WIDTH, batch)
    arrays = weight.numpy(), values.numpy().copy()
    entrants = {
        "torch": _chained(torch.mm, weight, values, torch.empty_like(values)),
        "torch, oneDNN": _onednns_products(weight, values),
        "compiled": _compiled_products(weight, values),
        "NumPy": _chained(np.dot, *arrays, np.empty_like(arrays[1])),
    }
    if harness.installed("jax"):
        entrants["XLA"] = _xlas_products(batch)
    work = 2e-6 * CHAIN * WIDTH * WIDTH * batch
    return {"n": batch} | {
        row.name: work / row.ms for row in harness.race(entrants, "torch", rounds=20)
    }


def _chained(product: Callable[..., Any], weight: Any, values: Any, others: Any) -> harness.Entrant:
    def call() -> None:
        for _ in range(CHAIN // 2):
            product(weight, values, out=others)
            product(weight, others, out=values)

    return call


def _onednns_products(weight: Tensor, values: Tensor) -> harness.Entrant:
    def call() -> None:
        product = values
        for _ in range(CHAIN):
            product = onednn.by_onednn(weight, product)

    return torch.no_grad()(call)


def _compiled_products(weight: Tensor, values: Tensor) -> harness.Entrant:
    def chained(weight: Tensor, values: Tensor) -> Tensor:
        for _ in range(CHAIN):
            values = weight @ values
        return values

    run = compiling.compiled(chained, native=True)
    return torch.no_grad()(lambda: run(weight, values))


def _xlas_products(batch: int) -> harness.Entrant:
    import jax

    @jax.jit
    def chained(weight: Any, values: Any) -> Any:
        for _ in range(CHAIN):
            values = weight @ values
        return values

    weight, values = jax.numpy.eye(WIDTH), jax.numpy.ones((WIDTH, batch))
    return lambda: chained(weight, values).block_until_ready()
