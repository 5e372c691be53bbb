"""What the time of compiled training steps and samples goes to: code, and all around it."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.codecache import CppWrapperCodeCache

import cnf
from benchmarks import harness
from benchmarks.continuous import TOLERANCE, cnf_modes, flow_with, trained
from cnf.nets import TimeMLP

# how long the calls of a turn take
SECONDS = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[16, 100, 512, 4096])
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    rounds = harness.ROUNDS[options.effort]
    with watched() as in_code:
        field, data = trained(2)
        tables = [
            harness.table(
                f"Compiled, batch {batch:,}",
                [
                    row
                    for name, passes in kinds(field, data[:batch])
                    for row in rows(name, passes, rounds, in_code)
                ],
                f"2–64–64–64–2, dopri5 at {TOLERANCE:g}, exact divergence, medians of calls. "
                "Code is what Inductor made, timed within the same calls; the rest is Python, its "
                "calls of PyTorch and guards.",
            )
            for batch in options.batches
        ]
    harness.write("breakdown", tables, options.out)


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], float]]:
    """Gives the seconds spent so far in code that is compiled, or read from disk, from here on."""
    load = CppWrapperCodeCache.load_pybinding
    spent = 0.0

    def loaded(*arguments: Any, **options: Any) -> Callable[[Any], Any]:
        start_code = load(*arguments, **options)

        def entry(handles: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = start_code(handles)
            spent += time.perf_counter() - start
            return result

        return entry

    with mock.patch.object(CppWrapperCodeCache, "load_pybinding", loaded):
        yield lambda: spent


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
    name: str,
    passes: dict[str, Callable[[], object]],
    rounds: int,
    in_code: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """Milliseconds of each pass."""
    for _ in range(3):
        start = time.perf_counter()
        for call in passes.values():
            call()
    turns = max(1, round(SECONDS / (time.perf_counter() - start)))
    whole: dict[str, list[float]] = {key: [] for key in passes}
    code: dict[str, list[float]] = {key: [] for key in passes}
    for _ in range(rounds * turns):
        for key, call in passes.items():
            start, before = time.perf_counter(), in_code()
            call()
            code[key].append(in_code() - before)
            whole[key].append(time.perf_counter() - start)
    for key in passes:
        ms, own = 1e3 * statistics.median(whole[key]), 1e3 * statistics.median(code[key])
        yield {
            "": f"{name}, {key}" if key else name,
            "ms": ms,
            "code": own,
            "rest": ms - own,
            "rest, %": 100 * (ms - own) / ms,
        }
