"""Levers of a continuous flow's speed, pulled one at a time, with what each costs in exactness."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

import cnf
from benchmarks import harness
from benchmarks.continuous import EXACT, TOLERANCE, Step, compared, flow_with, ours, trained
from benchmarks.evaluation import Density, Entrant, accurate_enough, density

T = TypeVar("T")

AS_IT_IS = "as it is"
METHODS = ("bosh3", "dopri5", "dopri8")
ERRORS = (1e-3, 1e-5, 1e-7, 1e-9)
LADDER = [10 ** (-k / 4) for k in range(6, 49)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--batch", type=harness.count, default=512)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    rounds = harness.ROUNDS[options.effort]
    tables = [training(gradient, options.batch, rounds) for gradient in ("adjoint", "checkpoint")]
    harness.write("levers", [*tables, methods(options.batch, rounds)], options.out)


def training(gradient: str, batch: int, rounds: int) -> dict[str, Any]:
    """A training step with one thing changed at a time."""
    field, data = trained(2)
    x = data[:batch]
    truth = ours(field, x.double(), None, EXACT).look()
    calls, notes = {}, {}
    for name, step in _changed(gradient, lambda solver: ours(field, x, None, solver)):
        calls[name] = step.call
        notes[name] = compared(step.look(), truth)
    rows = harness.race(calls, AS_IT_IS, rounds)
    return harness.table(
        f'Training step under "{gradient}", batch {batch}',
        [{**row.cells(), **notes[row.name]} for row in rows],
        f"2–64–64–64–2, exact divergence, dopri5 at {TOLERANCE:g}, uncompiled, {rounds} rounds; "
        "errors against float64 at 1e-10. A known first step is a solve's span by its steps. "
        "Products in bfloat16 are rounded only where torch finds units for them in the processor.",
    )


def _changed(gradient: str, build: Callable[[cnf.Solver], Step]) -> Iterator[tuple[str, Step]]:
    solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, norm="batch", gradient=gradient)
    yield AS_IT_IS, build(solver)
    with cnf.count_nfe() as work:
        build(solver).call()
    known = {"first_step": 1 / (work.accepted if gradient == "checkpoint" else work.accepted // 2)}
    told = dataclasses.replace(solver, options=known)
    if gradient == "adjoint":
        told = dataclasses.replace(told, adjoint_options=known)
    yield "first step known", build(told)
    yield "products in bfloat16", _in_bfloat16(build(solver))
    if gradient == "adjoint":
        for factor in (10, 100):
            looser = {f"adjoint_{kind}": factor * TOLERANCE for kind in ("rtol", "atol")}
            changed = dataclasses.replace(solver, **looser)
            yield f"adjoint at {factor * TOLERANCE:g}", build(changed)
        yield "gradients steer the steps", build(dataclasses.replace(solver, seminorm=False))


def _in_bfloat16(step: Step) -> Step:
    """The same where matrix products may round what they multiply, if the processor knows how."""

    def inside(function: Callable[[], T]) -> Callable[[], T]:
        def call() -> T:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return function()
            finally:
                torch.set_float32_matmul_precision(before)

        return call

    return Step(inside(step.call), inside(step.look))


def methods(batch: int, rounds: int) -> dict[str, Any]:
    """What each method takes for log-densities of some accuracy."""
    field, data = trained(2)
    x = data[-batch:].double()
    exact = density(flow_with(field, EXACT, x.dtype))
    truth = exact.log_prob(x)

    def at(method: str, tolerance: float) -> Density:
        solver = cnf.Solver(method, rtol=tolerance, atol=tolerance, norm="batch")
        return density(flow_with(field, solver, x.dtype))

    rows = []
    for wanted in ERRORS:
        calls, notes = {}, {}
        for method in METHODS:
            entrant = Entrant(functools.partial(at, method), exact, LADDER)
            found = accurate_enough(entrant, "log_prob", x, truth, wanted)
            calls[method], notes[method] = found
        for row in harness.race(calls, "dopri5", rounds):
            rows.append({**row.cells(), **notes[row.name], "": f"{row.name}, {wanted:g}"})
    return harness.table(
        f"Log-densities by methods, {batch} points, float64",
        rows,
        "Each at the loosest tolerance that keeps 99 % of its values as exact as its row says; "
        f"speedup over dopri5; {rounds} rounds.",
    )
