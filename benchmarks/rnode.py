"""What RNODE's path costs save: evaluations of the velocity, at which price in nats and seconds."""

from __future__ import annotations

import argparse
import functools
import json
import math
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import harness

TARGETS = ("8gaussians", "pinwheel")
SEED, TEST_SEED = 0, 1
TOLERANCE = 1e-5
SCORED, SOLVED = 20_000, 1_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="*", default=TARGETS, help="densities in the plane")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.0, 0.01, 0.1],
        help="of the kinetic energy at the start of a training; 0 is plain FFJORD",
    )  # fmt: skip
    parser.add_argument(
        "--jacobian", type=float, default=1.0, help="the Jacobian norm's weight relative to it"
    )
    parser.add_argument(
        "--decay", type=float, default=10.0, help="by what the weights have fallen at its end"
    )
    parser.add_argument("--keep", action="store_true", help="rows that were measured before")


def run(options: argparse.Namespace) -> None:
    note = (
        f"{options.steps} steps of {options.batch} points each, dopri5 at 1e-3, from the same "
        f"weights and batches. Gap: mean of true minus model's log-density on {SCORED:,} test "
        f"points, nats. NFE: evaluations in one solve of {SOLVED:,} of them at {TOLERANCE:g}, "
        "data to base, by the error norm over the batch and by the one per sample. Weights: of "
        f"∫‖v‖² dt and of ∫‖J‖² dt at the start; they fall by a factor {options.decay:g}."
    )
    rows: dict[str, list[dict[str, Any]]] = _known(note) if options.keep else {}
    for name in options.targets:
        found = rows.setdefault(name, [])
        for weight in options.weights:
            if all(row[""] != label(weight, options.jacobian) for row in found):
                found.append(measure(name, weight, options))
                # what is known so far, in case the rest is interrupted
                harness.write("rnode", [harness.table(*pair, note) for pair in rows.items()])


def _known(note: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by target that were measured with the same settings."""
    file = harness.RESULTS / "rnode.json"
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    return {table["title"]: table["rows"] for table in tables if table["note"] == note}


def label(weight: float, jacobian: float) -> str:
    """What a row is called."""
    return f"RNODE, weights {weight:g} and {weight * jacobian:g}" if weight else "FFJORD"


def measure(name: str, weight: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train one flow and look at it."""
    target = cnf.data.toy(name)
    torch.manual_seed(SEED)
    flow = cnf.ffjord(2, solver=cnf.Solver(gradient="checkpoint"))
    costs = {}
    if weight:
        # equal factors in equal times; a fixed weight would blur the density to the end
        costs = {
            cost: functools.partial(_falling, factor * weight, options.decay)
            for cost, factor in (
                (cnf.KineticEnergy(), 1.0),
                (cnf.JacobianNorm(), options.jacobian),
            )
        }
    objective = cnf.MaximumLikelihood(flow, costs=costs)
    history = cnf.fit(
        flow, target, objective=objective, steps=options.steps, batch_size=options.batch, seed=SEED,
        progress=False,
    )  # fmt: skip
    x = target.sample(SCORED, torch.Generator().manual_seed(TEST_SEED))
    with torch.no_grad():
        gap = target.log_prob(x.double()) - flow.log_prob(x, chunk=5000).double()
        request = cnf.Request(costs=(cnf.KineticEnergy(), cnf.JacobianNorm()))
        found = flow.evaluate(x[:SOLVED], request=request).costs
    return {
        "": label(weight, options.jacobian),
        "gap": float(gap.mean()),
        "±": float(gap.std()) / math.sqrt(len(gap)),
        "NFE, batch norm": evaluations(flow, x[:SOLVED], "batch"),
        "NFE, sample norm": evaluations(flow, x[:SOLVED], "sample"),
        "∫‖v‖²": float(found["kinetic_energy"].mean()),
        "∫‖J‖²": float(found["jacobian_norm"].mean()),
        "NFE in training": history.nfe,
        "training s": history.seconds,
    }


def evaluations(flow: cnf.Flow, x: Tensor, norm: str) -> int:
    """Evaluations of the velocity that one density solve takes at the tolerance."""
    flow.transform.solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, norm=norm)
    with torch.no_grad(), cnf.count_nfe() as nfe:
        flow.log_prob(x)
    return nfe.forward


def _falling(weight: float, decay: float, progress: float) -> float:
    return weight * decay**-progress
