"""What flow matching's times and optimiser bring: densities after equal steps."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import harness
from benchmarks.tabular import DATA, parts_of
from cnf.trial import split

RECIPES: dict[str, dict[str, Any]] = {
    "uniform times, AdamW 2e-2": {"times": "uniform", "optimizer": "adamw", "lr": 2e-2},
    "late times, AdamW 2e-2": {"times": "late", "optimizer": "adamw", "lr": 2e-2},
    "uniform times, Muon 3e-2": {"times": "uniform", "optimizer": "muon", "lr": 3e-2},
    "late times, Muon 3e-2": {"times": "late", "optimizer": "muon", "lr": 3e-2},
}
"""The last is what ``fit`` does by itself."""
TOLERANCE = 1e-5
CHUNK = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="*", default=["8gaussians", "checkerboard", "pinwheel"])
    parser.add_argument("--tables", type=Path, help="a folder with " + ", ".join(DATA.values()))
    parser.add_argument("--steps", type=harness.count, default=1000)
    parser.add_argument("--seeds", type=harness.count, default=3)
    parser.add_argument("--scored", type=harness.count, default=10_000, help="test points")


def run(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = [{"": name} for name in RECIPES]
    for target in options.targets:
        data = split(cnf.data.toy(target), test_size=options.scored)
        truth = float(data.truth.mean())
        _race(rows, f"{target}, gap", [data.train, data.validation, data.test], truth, options)
    for name in DATA if options.tables else ():
        _race(rows, f"{name}, nll", parts_of(name, options.tables), 0.0, options)
    note = (
        f"FFJORD (64-64-64) after {options.steps:,} steps of flow matching, 512 rows each with two "
        f"base samples: nats by which the truth lies above, or minus the log-density, of at most "
        f"{options.scored:,} test points at {TOLERANCE:g}; mean over {options.seeds} seeds, the "
        "spread between them in brackets, and milliseconds a step."
    )
    harness.write("matching", [harness.table("Flow matching at equal steps", rows, note)])


def _race(
    rows: list[dict[str, Any]],
    title: str,
    parts: list[Tensor],
    truth: float,
    options: argparse.Namespace,
) -> None:
    """Train by each recipe and add a column of what it came to."""
    train, validation, test = parts
    test = test[: options.scored]
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        found, spent = [], 0.0
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            flow = cnf.ffjord(train.shape[-1])
            start = time.perf_counter()
            cnf.fit(
                flow,
                train,
                objective=cnf.FlowMatching(flow, times=recipe["times"]),
                validation=validation,
                optimizer=recipe["optimizer"],
                lr=recipe["lr"],
                steps=options.steps,
                seed=seed,
                progress=False,
            )
            spent += time.perf_counter() - start
            request = cnf.Request(tolerance=TOLERANCE)
            with torch.no_grad():
                scores = flow.evaluate(test, request=request, chunk=CHUNK).log_prob
            found.append(truth - float(scores.double().mean()))
        spread = max(found) - min(found)
        each = 1e3 * spent / (options.seeds * options.steps)
        row[title] = f"{statistics.mean(found):.3f} ({spread:.3f}; {each:.1f} ms)"
        harness.say(f"{title}: {row['']}: {row[title]}")
