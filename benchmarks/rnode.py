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
VALIDATION_SEED, TEST_SEED = 1, 2
TOLERANCE = 1e-5
SCORED, SOLVED = 20_000, 1_000
PRICE = 0.01
"""Nats that saving evaluations may cost."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="*", default=TARGETS, help="densities in the plane")
    parser.add_argument("--steps", type=harness.count, default=1000)
    parser.add_argument("--batch", type=harness.count, default=512)
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
    parser.add_argument(
        "--warm-start", type=int, default=0, metavar="STEPS",
        help="of flow matching, without costs, before the likelihood's",
    )  # fmt: skip
    parser.add_argument("--lr", type=harness.amount, default=0.01, help="the peak learning rate")
    parser.add_argument(
        "--schedule", choices=("cosine", "constant"), default="cosine",
        help="of the learning rate; FFJORD's script has a constant one",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--compile", action="store_true", help="compiled steps in training")
    parser.add_argument(
        "--straight", action="store_true", help="only the evaluations of straight paths"
    )
    parser.add_argument(
        "--keep", action="store_true", help="rows that were measured before with these steps"
    )


def run(options: argparse.Namespace) -> None:
    if options.straight:
        harness.write("rnode-straight", [straight()])
        return
    before = f"{options.warm_start:,} steps of flow matching, then " if options.warm_start else ""
    seeded = f" (seed {options.seed})" if options.seed else ""
    note = (
        f"{before}{options.steps:,} steps of {options.batch} points each, {options.schedule} "
        f"learning rate of {options.lr:g}, dopri5 at 1e-3, from the same weights and "
        f"batches{seeded}. Gap: mean of true minus model's log-density, nats, on {SCORED:,} points "
        f"by which weights may be chosen and on {SCORED:,} others, the test points. NFE: "
        "evaluations in a solve of "
        f"{SOLVED:,} of these at {TOLERANCE:g}, data to base, on average, by the error norm over "
        "the batch and by the one per sample. Weights: of ∫‖v‖² dt and of ∫‖J‖² dt at the start, "
        "and by what factor they fall. Chosen: of those whose gap is on the validation points at "
        f"most {PRICE:g} above FFJORD's, the one with fewest evaluations in the batch norm, then "
        "in the sample norm, then with the least gap."
    )
    for name in options.targets:
        results = f"rnode-{name}-{options.steps}"
        results += "-warm" if options.warm_start else ""
        results += "-constant" if options.schedule == "constant" else ""
        results += f"-seed{options.seed}" if options.seed else ""
        if not options.keep:
            (harness.RESULTS / f"{results}.json").unlink(missing_ok=True)
        for weight in options.weights:
            rows = _known(results, note)
            if all(row[""] != label(weight, options) for row in rows):
                row = measure(name, weight, options)
                # read again: another process may have measured other weights meanwhile
                rows = [*_known(results, note), row]
            mark(rows)
            harness.write(results, [harness.table(name, rows, note)])


def mark(rows: list[dict[str, Any]]) -> None:
    """Say in every row whether it would be chosen, by the validation points alone."""
    plain = [row for row in rows if row[""] == "FFJORD"]
    good = [row for row in rows if plain and row["gap, val."] <= plain[0]["gap, val."] + PRICE]
    best = min(
        good,
        key=lambda row: (row["NFE, batch norm"], row["NFE, sample norm"], row["gap, val."]),
        default=None,
    )
    for row in rows:
        row["chosen"] = "yes" if row is best else ""


def _known(results: str, note: str) -> list[dict[str, Any]]:
    """Rows that were measured before with the same settings."""
    file = harness.RESULTS / f"{results}.json"
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    return [row for table in tables if table["note"] == note for row in table["rows"]]


def label(weight: float, options: argparse.Namespace) -> str:
    """What a row is called."""
    if not weight:
        return "FFJORD"
    return f"RNODE, {weight:g} and {weight * options.jacobian:g}, falling {options.decay:g}-fold"


def measure(name: str, weight: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train one flow and look at it."""
    target = cnf.data.toy(name)
    torch.manual_seed(options.seed)
    flow = cnf.ffjord(2, solver=cnf.Solver(gradient="checkpoint", compile=options.compile))
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
    if options.warm_start:
        cnf.fit(
            flow, target, objective="flow-matching", steps=options.warm_start,
            batch_size=options.batch, seed=options.seed, progress=False,
        )  # fmt: skip
    history = cnf.fit(
        flow, target, objective=objective, steps=options.steps, batch_size=options.batch,
        lr=options.lr, schedule=options.schedule, seed=options.seed, progress=False,
    )  # fmt: skip
    chosen_by, _ = gaps(target, flow, VALIDATION_SEED)
    gap, x = gaps(target, flow, TEST_SEED)
    with torch.no_grad():
        request = cnf.Request(costs=(cnf.KineticEnergy(), cnf.JacobianNorm()))
        found = flow.evaluate(x[:SOLVED], request=request).costs
    return {
        "": label(weight, options),
        "gap, val.": float(chosen_by.mean()),
        "gap, test": float(gap.mean()),
        "±": float(gap.std()) / math.sqrt(len(gap)),
        "NFE, batch norm": evaluations(flow, x, "batch"),
        "NFE, sample norm": evaluations(flow, x, "sample"),
        "∫‖v‖²": float(found["kinetic_energy"].mean()),
        "∫‖J‖²": float(found["jacobian_norm"].mean()),
        "NFE in training": history.nfe,
        "training s": history.seconds,
    }


def gaps(target: cnf.data.Target, flow: cnf.Flow, seed: int) -> tuple[Tensor, Tensor]:
    """True minus the model's log-density at points of that seed, and the points."""
    x = target.sample(SCORED, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return target.log_prob(x.double()) - flow.log_prob(x, chunk=5000).double(), x


def evaluations(flow: cnf.Flow, x: Tensor, norm: str) -> float:
    """Evaluations of the velocity that a density solve takes at the tolerance, on average."""
    flow.transform.solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, norm=norm)
    with torch.no_grad(), cnf.count_nfe() as nfe:
        flow.log_prob(x, chunk=SOLVED)
    return nfe.forward / nfe.solves


def _falling(weight: float, decay: float, progress: float) -> float:
    return weight * decay**-progress


def straight() -> dict[str, Any]:
    """What a solve costs where nothing is left to straighten: x ↦ k x along straight lines."""
    rows = []
    for factor in (2.0, 3.0, 4.0, 6.0, 8.0):
        x = torch.randn(SOLVED, 2, generator=torch.Generator().manual_seed(0)) / factor
        row: dict[str, Any] = {"": f"{factor:g} times as wide"}
        for norm in ("batch", "sample"):
            solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, norm=norm)
            flow = cnf.Continuous(Widening(factor), solver=solver)
            with torch.no_grad(), cnf.count_nfe() as nfe:
                flow.inverse(x)
            row[f"NFE, {norm} norm"] = nfe.forward
        rows.append(row)
    note = (
        f"Evaluations of one density solve of {SOLVED:,} points at {TOLERANCE:g}, data to base, of "
        "a flow that widens the data evenly in both dimensions with no acceleration at all."
    )
    return harness.table("Straight paths", rows, note)


class Widening(torch.nn.Module):
    """The velocity whose paths from data to base are x (1 + (k - 1)(1 - t)): straight and even."""

    couples_batch = False

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        grown = 1 + (self.factor - 1) * (1 - t)
        return -(self.factor - 1) / grown * x
