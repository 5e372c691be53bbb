"""What a training step keeps for its backward pass, and what scoring a million rows takes."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import continuous, harness
from cnf.nets import TimeMLP
from cnf.plots import canvas

MODES = ("adjoint", "checkpoint", "backprop")
BATCH = 512
PARTS = ("step", "rows")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ffjord, at 1e-3": ("ffjord", {"solver": cnf.Solver(rtol=1e-3, atol=1e-3, norm="batch")}),
    "nsf, support=(0, 1)": ("nsf", {"support": "interval"}),
}
"""Which flows score: the name of a model and its arguments."""
TOLERANCES = {
    "quick": [1e-3, 1e-6, 1e-9],
    "usual": [10.0**-k for k in range(3, 10)],
    "full": [10.0 ** -(k / 2) for k in range(4, 21)],
}
ROWS = {"quick": 100_000, "usual": 1_000_000, "full": 4_000_000}
"""How a step's tolerances are spaced, and how many rows are scored, by the effort asked for."""
LIMIT = 2.0
"""Gigabytes that scoring should stay below."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}")
    harness.add_effort(parser)
    parser.add_argument(
        "--rows", type=harness.count,
        help="rows to score; by default a million, 100,000 with --quick, 4,000,000 with --full",
    )  # fmt: skip
    parser.add_argument("--chunk", type=harness.count, default=10_000, help="rows scored at a time")
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")
    parser.add_argument("--picture", type=Path, default=harness.DOCS / "memory.png")


def run(options: argparse.Namespace) -> None:
    rows = options.rows or ROWS[options.effort]
    if options.only is not None:  # the process whose memory is measured
        print(json.dumps(scored(options.only, rows, options.chunk)))
        return
    if "step" in options.parts:
        canvas.require()
    for part in options.parts:
        found = step(TOLERANCES[options.effort]) if part == "step" else scoring(rows, options.chunk)
        harness.write(f"memory-{part}", [found], options.out)
        if part == "step":
            draw(options.picture, found["rows"])


def step(tolerances: Sequence[float]) -> dict[str, Any]:
    """What a training step keeps, by tolerance and gradient mode."""
    field, data = continuous.trained(2)
    x = data[:BATCH].double()
    state = BATCH * 3 * 8
    return harness.table(
        "Bytes that a training step keeps for its backward pass",
        [kept_at(tolerance, field, x) for tolerance in tolerances],
        f"ffjord(2), 2–64–64–64–2, {BATCH} points in float64, 8gaussians after 200 steps of "
        "training; what autograd saves, parameters left out, in MB. `accepted` are the adjoint's "
        "and checkpoint's steps forward, `NFE` a mode's evaluations of the forward pass. One "
        f"state, {BATCH} points and log-densities, is {state / 1e6:.4g} MB.",
    )


def scoring(rows: int, chunk: int) -> dict[str, Any]:
    """What scoring many rows takes, a process for each flow."""
    found = [measured(name, rows, chunk) for name in MODELS]
    before = [row.pop("before GB") for row in found]
    return harness.table(
        "Scoring many rows",
        [{"": "import only", "peak GB": before[0]}, *found],
        f"`flow.log_prob(x, chunk={chunk})` on {rows:,} rows of two columns, in a process of its "
        "own whose peak resident memory is given; the first line is PyTorch alone.",
    )


def kept_at(tolerance: float, field: TimeMLP, x: Tensor) -> dict[str, Any]:
    """Megabytes kept in every mode at a tolerance."""
    row: dict[str, Any] = {"tolerance": tolerance}
    for mode in MODES:
        solver = cnf.Solver(rtol=tolerance, atol=tolerance, gradient=mode, norm="batch")
        flow = continuous.flow_with(field, solver, torch.float64)
        size, work = kept(flow, x)
        told = {} if mode == "backprop" else {"accepted": work.accepted}
        row |= {**told, f"NFE {mode}": work.forward, mode: size / 1e6}
    return row


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """What every mode keeps against the evaluations that it makes, on logarithmic axes."""
    figure = canvas.new(5.2, 3.8)
    axes = figure.subplots()
    for mode, colour, dash in zip(MODES, canvas.COLOURS, canvas.DASHES, strict=False):
        nfe, kept = ([row[key] for row in rows] for key in (f"NFE {mode}", mode))
        axes.loglog(nfe, kept, marker="o", markersize=4, color=colour, linestyle=dash, label=mode)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("evaluations of the forward pass")
    axes.set_ylabel("kept for the backward pass (MB)")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.9, edgecolor="none")
    canvas.write(figure, path)


def kept(flow: cnf.Flow, x: Tensor) -> tuple[int, Any]:
    """Bytes that the forward pass of a training step saves besides the parameters, and its work."""
    own = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    storages: dict[int, int] = {}
    alive = []  # a storage that is freed may give its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    objective = cnf.MaximumLikelihood(flow, tolerance=None)
    with (
        cnf.count_nfe() as work,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = objective(cnf.Batch(x)).total
    del loss
    return sum(storages.values()), work


def measured(name: str, rows: int, chunk: int) -> dict[str, Any]:
    """Score rows in a process of its own."""
    options = ["--only", name, "--rows", str(rows), "--chunk", str(chunk)]
    command = [sys.executable, "-m", "benchmarks", "memory", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return {"": name, **found, f"below {LIMIT:g} GB": found["peak GB"] < LIMIT}


def scored(name: str, rows: int, chunk: int) -> dict[str, float]:
    """Score rows in this process."""
    before = _peak()
    torch.manual_seed(0)
    model, arguments = MODELS[name]
    flow = cnf.models[model].build(2, **arguments)
    x = torch.rand(rows, 2)
    start = time.perf_counter()
    with torch.no_grad():
        flow.log_prob(x, chunk=chunk)
    return {"before GB": before, "peak GB": _peak(), "s": time.perf_counter() - start}


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had when it forked
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
