"""What the time of compiled training steps and samples goes to: code, and all around it."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import cnf
from benchmarks import harness
from benchmarks.continuous import TOLERANCE, cnf_modes, flow_with, trained
from cnf.nets import TimeMLP

# what Inductor calls the function that starts a piece of C++
ENTRY = "inductor_entry_cpp"
# how long the calls of a turn take
SECONDS = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[16, 100, 512, 4096])
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    rounds = harness.ROUNDS[options.effort]
    field, data = trained(2)
    tables = [
        harness.table(
            f"Compiled, batch {batch:,}",
            [
                row
                for name, passes in kinds(field, data[:batch])
                for row in rows(name, passes, rounds)
            ],
            f"2–64–64–64–2, dopri5 at {TOLERANCE:g}, exact divergence, medians of calls. "
            "Code is what Inductor made, as Python's profiler times its calls; the rest is Python, "
            "its calls of PyTorch and guards.",
        )
        for batch in options.batches
    ]
    harness.write("breakdown", tables, options.out)


def kinds(field: TimeMLP, x: Tensor) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """What is taken apart: each a name and its passes, one after the other."""
    for gradient in ("checkpoint", "adjoint"):
        flow = flow_with(field, cnf_modes()[f"{gradient}, compiled"])
        yield f"training step, {gradient}", training(flow, x)
    flow = flow_with(field, cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, compile=True)).eval()
    yield "samples", {"": torch.no_grad()(lambda: flow.decode(x))}


def training(flow: cnf.Flow, x: Tensor) -> dict[str, Callable[[], object]]:
    """The two passes of a likelihood training step."""
    objective = cnf.MaximumLikelihood(flow, tolerance=None)
    losses: list[Tensor] = []

    def forward() -> None:
        flow.zero_grad()
        losses[:] = [objective(cnf.Batch(x)).total]

    return {"forward": forward, "back": lambda: losses[0].backward()}


def rows(
    name: str, passes: dict[str, Callable[[], object]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of each pass."""
    for _ in range(3):
        start = time.perf_counter()
        for call in passes.values():
            call()
    turns = max(1, round(SECONDS / (time.perf_counter() - start)))
    whole: dict[str, list[float]] = {key: [] for key in passes}
    code: dict[str, list[float]] = {key: [] for key in passes}
    for _ in range(rounds):
        for found, taken in ((whole, timed), (code, in_code)):
            for key, call in turns * list(passes.items()):
                found[key].append(taken(call))
    for key in passes:
        ms, own = 1e3 * statistics.median(whole[key]), 1e3 * statistics.median(code[key])
        yield {
            "": f"{name}, {key}" if key else name,
            "ms": ms,
            "code": own,
            "rest": ms - own,
            "rest, %": 100 * (ms - own) / ms,
        }


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_code(call: Callable[[], object]) -> float:
    """Seconds of a call that it spends in compiled code."""
    profile = cProfile.Profile()
    profile.runcall(call)
    stats = cast(Any, pstats.Stats(profile)).stats
    return sum(own for (*_, name), (_, _, own, *_) in stats.items() if ENTRY in name)
