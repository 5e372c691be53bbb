"""Flows of images: bits per dimension after so many steps, and a picture of samples.

The 8×8 digits of scikit-learn, or MNIST from an NPZ file with arrays ``train`` and ``test`` of
shape (N, 784), uint8. Pixels are dequantised uniformly: the bits are an upper bound.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import harness
from cnf import plots
from examples.digits import load

Shape = tuple[int, ...]

# two steps for each block: half the work of an adaptive solve, and the same for every batch
TRAINED = cnf.Solver("rk4", step_size=0.5, gradient="backprop")
SCORED = cnf.Solver(rtol=1e-5, atol=1e-5)
MODELS: dict[str, Callable[[Shape, int], cnf.Flow]] = {
    "glow": lambda shape, bins: cnf.glow(shape, hidden=(32, 32), dequantize="uniform", bins=bins),
    "realnvp": lambda shape, bins: cnf.realnvp(
        shape, hidden=(32,), layers=4, dequantize="uniform", bins=bins
    ),
    "flowpp": lambda shape, bins: cnf.flowpp(
        shape, hidden=(32,), heads=2, components=4, dequantize="uniform", bins=bins
    ),
    "ffjord": lambda shape, bins: cnf.ffjord(
        shape,
        hidden=(16, 16),
        levels=2,
        conditioning="concat",
        activation="softplus",
        dequantize="uniform",
        bins=bins,
        divergence=cnf.Hutchinson(),
        solver=TRAINED,
    ),
}
LR = {"ffjord": 2e-2}
"""Of models for which the objective's own is slow: 120 steps on digits brought 0.46 bits more."""
EXACT_PIXELS = 64
"""Images of more get their trace from a probe: unbiased, and counted in the standard error."""
SHOWN = 16
DPI = 75  # of the picture, which is many small grey squares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mnist", type=Path, help="an NPZ file with train and test, flat uint8")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--steps",
        nargs="+",
        type=harness.count,
        default=[1000],
        help="of all models, or of each in turn",
    )
    parser.add_argument("--batch", type=harness.count, default=32)
    parser.add_argument("--test", type=harness.count, default=1000, help="held-out images to score")
    parser.add_argument("--name", help="of the files written; images-digits or images-mnist")
    parser.add_argument("--pictures", type=Path, default=Path("docs"))


def run(options: argparse.Namespace) -> None:
    train, test, bins = load(options.mnist)
    test = test[: options.test]
    data = "digits" if options.mnist is None else "MNIST"
    name = options.name or f"images-{data.lower()}"
    steps = options.steps * (len(options.models) if len(options.steps) == 1 else 1)
    note = (
        f"Batches of {options.batch} of {len(train):,} images; bits per dimension of {len(test)} "
        "held-out images, an upper bound (uniform dequantisation)."
    )
    rows: list[dict[str, Any]] = []
    cool, warm = {"held out": test[:SHOWN]}, {"others held out": test[SHOWN : 2 * SHOWN]}
    for model, count in zip(options.models, steps, strict=True):
        row, samples = measure(model, train, test, bins, count, options.batch)
        rows.append(row)
        harness.write(name, [harness.table(data, rows, note)])
        cool[f"{model}, temperature 0.7"], warm[f"{model}, temperature 1"] = samples
        picture = plots.images({**cool, **warm}, high=bins - 1, columns=4, across=len(cool))
        picture.set_dpi(DPI)
        plots.write(picture, options.pictures / f"{name}.png")


def measure(
    model: str, train: Tensor, test: Tensor, bins: int, steps: int, batch: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Train one model, score it, draw samples."""
    torch.manual_seed(0)
    shape = tuple(train.shape[1:])
    flow = MODELS[model](shape, bins)
    start = time.process_time()
    history = cnf.fit(
        flow,
        train[128:],
        validation=train[:128],
        steps=steps,
        batch_size=batch,
        warmup=0.1,
        lr=LR.get(model),
    )
    spent = time.process_time() - start
    continuous = [part for part in flow.modules() if isinstance(part, cnf.Continuous)]
    for part in continuous:
        part.solver = SCORED  # the density is the true one, not that of two steps
    exact = not continuous or shape[-1] * shape[-2] <= EXACT_PIXELS
    noise = torch.Generator().manual_seed(1)
    request = cnf.Request(divergence=cnf.Exact() if exact else None, generator=noise)
    with torch.no_grad():
        found = flow.evaluate(test, request=request, chunk=100)
    bits = cnf.bits_per_dimension(found.log_prob, shape)
    samples = [
        flow.sample((SHOWN,), temperature=temperature, generator=noise)
        for temperature in (0.7, 1.0)
    ]
    row = {
        "model": model,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "steps": history.steps,
        "CPU seconds": spent,
        "NFE": history.nfe,
        "bits/dim": bits.mean().item(),
        "± (standard error)": bits.std().item() / len(bits) ** 0.5,
        "trace": "exact" if exact else "estimated",
    }
    return row, samples
