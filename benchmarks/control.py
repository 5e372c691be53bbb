"""The choice of steps: torchdiffeq's and ours, by evaluations to the same accuracy."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cnf
from benchmarks import continuous, evaluation, harness
from cnf.nets import TimeMLP

TOLERANCES = [10 ** (-quarters / 4) for quarters in range(16, 29)]
ACCURACIES = (1e-4, 1e-5)
THEIRS = "torchdiffeq"
# given, so that only the choice of what follows differs
FIRST_STEP = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", type=harness.count, nargs="+", default=[2, 43, 63])
    parser.add_argument("--points", type=harness.count, default=256)
    parser.add_argument(
        "--draws", type=harness.count, default=3, help="sets of points for each figure"
    )
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    tables = []
    for features in options.features:
        field, data = continuous.trained(features)
        rows = []
        for what in ("decode", "log_prob"):
            for norm in ("batch", "sample"):
                rows += compared(field, data, what, norm, options.points, options.draws)
        tables.append(
            harness.table(
                f"Steps of dopri5, D = {features}",
                rows,
                f"{options.points} points, {options.draws} sets of them; log-determinants in the "
                f"state and a first step of {FIRST_STEP} for both. Evaluations at tolerances of "
                "1e-4 to 1e-7, all of them together, and fitted by a power of the error (the 99th "
                f"percentile, against a float64 solve at 1e-10) at {ACCURACIES[0]:g} and "
                f"{ACCURACIES[1]:g}.",
            )
        )
        harness.write("control", tables, options.out)


def compared(
    field: TimeMLP, data: Tensor, what: str, norm: str, points: int, draws: int
) -> list[dict[str, Any]]:
    """A row each, theirs first, of sums and geometric means over the draws."""
    truth = continuous.flow_with(field, continuous.EXACT, torch.float64)
    ways = {THEIRS: "backprop", "cnf": "checkpoint"}
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(points, field.features, generator=generator)
        if what == "log_prob":
            x = data[torch.randint(len(data), (points,), generator=generator)]
        with torch.no_grad():
            exact = getattr(truth, what)(x.double())
        for way, gradient in ways.items():
            found[way].append(_figures(field, what, x, exact, gradient, norm))
    rows, theirs = [], np.exp(np.mean(np.log(found[THEIRS]), 0))
    for way, figures in found.items():
        total, *at = np.exp(np.mean(np.log(figures), 0))
        row = {"": f"{what}, norm by {norm}, {way}", "NFE": round(float(total))}
        for accuracy, nfe, reference in zip(ACCURACIES, at, theirs[1:], strict=True):
            row[f"at {accuracy:g}"] = float(nfe)
            row[f"at {accuracy:g}, of theirs"] = float(nfe / reference)
        harness.say(str(row))
        rows.append(row)
    return rows


def _figures(
    field: TimeMLP, what: str, x: Tensor, exact: Tensor, gradient: str, norm: str
) -> list[float]:
    """Evaluations over all tolerances, and at each accuracy."""
    errors, work = [], []
    for tolerance in TOLERANCES:
        solver = cnf.Solver(
            rtol=tolerance,
            atol=tolerance,
            norm=norm,
            gradient=gradient,
            quadrature=False,
            options={"first_step": FIRST_STEP},
        )
        flow = continuous.flow_with(field, solver)
        with torch.no_grad(), cnf.count_nfe() as nfe:
            value = getattr(flow, what)(x)
        errors.append(evaluation.error_99(value, exact))
        work.append(nfe.forward)
    slope, start = np.polyfit(np.log(errors), np.log(work), 1)
    return [sum(work), *[math.exp(start + slope * math.log(a)) for a in ACCURACIES]]
