"""Log-determinants by quadrature beside those in the solver's state: errors, work and time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import continuous, harness
from cnf.trial import split, train

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
POINTS = 512
WARM = "8gaussians after a warm start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", type=harness.count, nargs="+", default=[2, 43], help="D of the mixtures"
    )
    parser.add_argument("--seconds", type=harness.amount, default=20, help="of the warm start")
    parser.add_argument("--rounds", type=harness.count, default=7)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    tables = []
    for features in options.features:
        field, data = continuous.trained(features)
        flow = continuous.flow_with(field, cnf.Solver())
        tables.append(compared(f"D = {features}", flow, data[-POINTS:], options.rounds))
    data = split(cnf.data.toy("8gaussians"))
    flow, _ = train("ffjord+fm", data, seconds=options.seconds, progress=False)
    tables.append(compared(WARM, flow, data.test[:POINTS], options.rounds))
    harness.write("quadrature", tables, options.out)


def compared(name: str, flow: cnf.Flow, x: Tensor, rounds: int) -> dict[str, Any]:
    """Both ways at every tolerance, each timed against the state's at the same one."""
    truth = scored(flow.double(), x.double(), continuous.EXACT)()
    flow.float()
    rows = []
    for tolerance in TOLERANCES:
        entrants, notes = {}, {}
        for way, quadrature in (("state", False), ("quadrature", True)):
            solver = cnf.Solver(rtol=tolerance, atol=tolerance, norm="batch", quadrature=quadrature)
            entrants[way] = scored(flow, x, solver)
            with cnf.count_nfe() as work:
                error = (entrants[way]().double() - truth).abs()
            steps = work.accepted + work.rejected
            notes[way] = {
                "tolerance": f"{tolerance:g}",
                "error, 99 %": float(error.quantile(0.99)),
                "error, rms": float(error.square().mean().sqrt()),
                "NFE": work.forward,
                "divergences": 2 + (3 if quadrature else 6) * steps,
            }
        for row in harness.race(entrants, "state", rounds):
            rows.append({**row.cells(), **notes[row.name]})
            harness.say(f"{name}: {rows[-1]}")
    return harness.table(
        f"Log-determinant in the state and by quadrature, {name}",
        rows,
        f"{len(x)} points, dopri5, eager, norm over the batch; errors of the log-density against a "
        f"float64 solve at 1e-10; `speedup` at the same tolerance; {rounds} rounds.",
    )


def scored(flow: cnf.Flow, x: Tensor, solver: cnf.Solver) -> Callable[[], Tensor]:
    """The log-densities of x under a solver, which is set at every call."""
    (block,) = [part for part in flow.modules() if isinstance(part, cnf.Continuous)]

    @torch.no_grad()
    def call() -> Tensor:
        block.solver = solver
        return flow.log_prob(x)

    return call
