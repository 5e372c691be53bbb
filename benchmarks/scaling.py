"""How the cost of a training step grows with the batch, and with the dimension under Hutchinson.

The solve is pinned to a fixed grid, so that every step makes the same number of evaluations and
what grows is the cost of one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cnf
from benchmarks import harness
from cnf.plots import canvas

GRID = cnf.Solver("rk4", step_size=0.25, gradient="checkpoint")
BATCH, FEATURES = 256, 2
BATCHES = {
    "quick": [4**k for k in range(2, 7)],
    "usual": [4**k for k in range(2, 9)],
    "full": [2**k for k in range(4, 17)],
}
DIMENSIONS = {
    "quick": [4**k for k in range(5)],
    "usual": [2**k for k in range(11)],
    "full": [2**k for k in range(12)],
}
ROUNDS = {"quick": 3, "usual": 7, "full": 15}
"""How far the ladders go, in which steps, and how often, by the effort that is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")
    parser.add_argument("--picture", type=Path, default=harness.DOCS / "scaling.png")


def run(options: argparse.Namespace) -> None:
    canvas.require()
    effort = options.effort
    batches, features, rounds = BATCHES[effort], DIMENSIONS[effort], ROUNDS[effort]
    by_batch = grown("batch", batches, lambda n: step(n, FEATURES, None), rounds)
    by_features = grown("D", features, lambda d: step(BATCH, d, cnf.Hutchinson()), rounds)
    work = "rk4 with 4 steps (16 evaluations, and 16 recomputed), hidden 64–64–64"
    growth = (
        f"Medians of {rounds}; `exponent` is the slope of log time against log size from the line "
        "before."
    )
    tables = [
        harness.table(
            "Training step by batch", by_batch, f"D = {FEATURES}, exact; {work}. {growth}"
        ),
        harness.table(
            "Training step by dimension",
            by_features,
            f"batch {BATCH}, one Hutchinson probe; {work}. {growth}",
        ),
    ]
    harness.write("scaling", tables, options.out)
    draw(options.picture, by_batch, by_features)


def step(batch: int, features: int, divergence: Any) -> Callable[[], object]:
    """A likelihood training step of so many points and dimensions."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        flow = cnf.ffjord(features, solver=GRID)
    objective = cnf.MaximumLikelihood(flow, divergence=divergence, tolerance=None)
    x = torch.randn(batch, features, generator=generator)

    def call() -> None:
        flow.zero_grad()
        objective(cnf.Batch(x), generator=generator).total.backward()

    return call


def grown(
    name: str, sizes: Sequence[int], make: Callable[[int], Callable[[], object]], rounds: int
) -> list[dict[str, Any]]:
    """Median times at every size, taken in turn."""
    calls = {size: make(size) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for size, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[size].append(time.perf_counter() - start)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        row = {name: size, "ms": 1e3 * statistics.median(seconds[size])}
        if rows:
            last = rows[-1]
            row["exponent"] = float(np.log(row["ms"] / last["ms"]) / np.log(size / last[name]))
        rows.append(row)
    return rows


def draw(path: Path, by_batch: Sequence[Any], by_features: Sequence[Any]) -> None:
    """Both on logarithmic axes, beside a line of slope one through the last point."""
    figure = canvas.new(9.0, 3.8)
    panels = ((by_batch, "batch"), (by_features, "D"))
    for axes, (rows, name) in zip(figure.subplots(1, 2), panels, strict=True):
        sizes, times = ([row[key] for row in rows] for key in (name, "ms"))
        axes.loglog(sizes, times, marker="o", markersize=4, color=canvas.COLOURS[0], label="cnf")
        linear = [times[-1] * size / sizes[-1] for size in sizes]
        axes.loglog(sizes, linear, linestyle="--", color="0.5", label="linear")
        axes.set_xlabel("batch, D = 2" if name == "batch" else f"D, Hutchinson, batch {BATCH}")
        axes.set_ylabel("training step (ms)")
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.9, edgecolor="none")
    canvas.write(figure, path)
