"""Round trips through trained flows: fit moons, then x → z → x in float32 and in float64.

The promise: at most 1e-4 in float32 and 1e-9 in float64, 1e-7 where an inverse is numeric. A
continuous flow is as exact as its solver is told to be: in float64 it is given dopri8 at 1e-11.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import harness

TIGHT = cnf.Solver("dopri8", rtol=1e-11, atol=1e-11)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nsf, autoregressive": ("nsf", {"autoregressive": True}),
    "ncsf, autoregressive": ("ncsf", {"autoregressive": True}),
    "planar, forward": ("planar", {"formula": "forward"}),
}
NUMERIC = {"flowpp", "naf", "unaf", "bpf", "sospf", "bnaf", "gaussianization", "planar",
           "planar, forward", "sylvester", "residual_flow", "iaf", "radial"}  # fmt: skip
LAST = "continuous"
PROMISED = {torch.float32: 1e-4, torch.float64: 1e-9}
NUMERICALLY = 1e-7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # what takes long comes last: the figures are written as they come
    names = sorted([*cnf.models, *VARIANTS], key=lambda name: cnf.models[base(name)].family == LAST)
    parser.add_argument("--target", default="moons")
    parser.add_argument("--steps", type=harness.count, default=300)
    parser.add_argument("--batch", type=harness.count, default=256)
    parser.add_argument("--points", type=harness.count, default=5000)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--name", default="roundtrip", help="of the files written")


def run(options: argparse.Namespace) -> None:
    target = cnf.data.toy(options.target)
    generator = torch.Generator().manual_seed(2026)
    x = target.sample(options.points, generator, dtype=torch.float64)
    note = (
        f"The largest |x - decode(encode(x))| of {len(x)} fresh points, after {options.steps} "
        f"steps of {options.batch} rows."
    )
    rows = []
    for name in options.models:
        rows.append(measure(name, target, x, options.steps, options.batch))
        harness.write(options.name, [harness.table(f"Round trips on {options.target}", rows, note)])


def base(name: str) -> str:
    """The model that a name is a variant of."""
    return VARIANTS.get(name, (name, {}))[0]


def measure(
    name: str, target: cnf.data.Target, x: Tensor, steps: int, batch: int
) -> dict[str, Any]:
    """Fit one model and send fresh points there and back."""
    torch.manual_seed(0)
    model, arguments = VARIANTS.get(name, (name, {}))
    flow = cnf.models[model].build(2, **arguments)
    on_circle = model == "ncsf"
    rows = target.sample(20_000, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    history = cnf.fit(flow, angles(rows) if on_circle else rows, steps=steps, batch_size=batch)
    seconds = time.perf_counter() - start
    x = angles(x) if on_circle else x
    errors = {torch.float32: round_trip(flow, x.float())}
    double = flow.double()
    continuous = [part for part in double.modules() if isinstance(part, cnf.Continuous)]
    for part in continuous:
        part.solver = TIGHT
    errors[torch.float64] = round_trip(double, x)
    limit = NUMERICALLY if name in NUMERIC else PROMISED[torch.float64]
    kept = errors[torch.float32] <= PROMISED[torch.float32] and errors[torch.float64] <= limit
    return {
        "model": name,
        "inverse": "solved" if continuous else "numeric" if name in NUMERIC else "closed",
        "float32": errors[torch.float32],
        "float64": errors[torch.float64],
        "kept": "yes" if kept else "no",
        "nats": history.best_validation,
        "seconds of fitting": seconds,
    }


def angles(x: Tensor) -> Tensor:
    """Points of the plane as pairs of angles."""
    return 2 * torch.atan(x)


@torch.no_grad()
def round_trip(flow: cnf.Flow, x: Tensor) -> float:
    return float((flow.decode(flow.encode(x)) - x).abs().max())
