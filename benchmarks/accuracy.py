"""How exact the numbers of trained flows are: densities, round trips, gradients."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import harness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, help="what `cnf compare TARGET --out RUNS` wrote")
    parser.add_argument("--points", type=harness.count, default=5000)
    harness.add_out(parser)


def run(options: argparse.Namespace) -> None:
    harness.report(examine(options.runs, options.points), options.out, options.runs)


def examine(runs: Path, points: int) -> dict[str, Any]:
    """Check every flow that a comparison saved, on fresh points of its target."""
    results = json.loads((runs / "results.json").read_text())
    generator = torch.Generator().manual_seed(2026)
    x = cnf.data.toy(results["target"]).sample(points, generator, dtype=torch.float64)
    names = [row["model"] for row in results["rows"] if "error" not in row]
    return {
        "target": results["target"],
        "points": points,
        "models": {name: check(runs / name, x) for name in names},
    }


def check(folder: Path, x: Tensor) -> dict[str, float]:
    single, double = cnf.load(folder), cnf.load(folder).double()
    found = {
        "round_trip_float32": round_trip(single, x.float()),
        "round_trip_float64": round_trip(double, x),
    }
    if not isinstance(double.transform, cnf.Continuous):
        return found
    reference = cnf.load(folder).double()
    reference.transform.solver = cnf.Solver(method="dopri8", rtol=1e-10, atol=1e-10)
    with torch.no_grad(), cnf.count_nfe() as nfe:
        log_prob = single.log_prob(x.float()).double()
    with torch.no_grad():
        error = (log_prob - reference.log_prob(x)).abs()
    solver = double.transform.solver
    adjoint = gradient(double, x[:500])
    double.transform.solver = dataclasses.replace(solver, gradient="backprop")
    backprop = gradient(double, x[:500])
    return {
        **found,
        "tolerance": solver.rtol,
        "nfe": nfe.forward,
        "log_prob_error_q99": float(error.quantile(0.99)),
        "log_prob_error_max": float(error.max()),
        "gradient_adjoint_against_backprop": float((adjoint - backprop).norm() / backprop.norm()),
    }


def round_trip(flow: cnf.Flow, x: Tensor) -> float:
    with torch.no_grad():
        return float((flow.decode(flow.encode(x)) - x).abs().max())


def gradient(flow: cnf.Flow, x: Tensor) -> Tensor:
    """The gradient of the mean log-density with respect to all parameters, flattened."""
    parameters = [p for p in flow.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(flow.log_prob(x).mean(), parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])
