"""Continuous flows on a CUDA device: training steps and densities of the 2-D and the 63-D net."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import cnf
from benchmarks import continuous, harness, reference
from benchmarks.continuous import EXACT, FFJORD, HIDDEN, TOLERANCE, Step
from benchmarks.roofline import ALONE, alone
from cnf.nets import TimeMLP

T = TypeVar("T")

STEPS: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "norm": "batch"}
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": "reduce-overhead"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=harness.count, default=10_000)
    parser.add_argument("--features", type=harness.count, nargs="+", default=[2, 63])
    parser.add_argument(
        "--gradients",
        nargs="+",
        choices=("adjoint", "checkpoint"),
        default=["checkpoint", "adjoint"],
        help="which of ours are compiled",
    )
    parser.add_argument("--rounds", type=harness.count)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    # before anybody imports JAX: memory as it is needed, and products as exact as torch's
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m benchmarks gpu needs a CUDA device, and PyTorch sees none here")
    rounds = options.rounds or harness.ROUNDS[options.effort]
    for features in options.features:
        field, data = continuous.trained(features)
        field, x = copy.deepcopy(field).to(device), data[: options.batch].to(device)

        def save(*tables: dict[str, Any], name: str = f"gpu-{features}") -> None:
            harness.write(name, tables, options.out, quiet=True)

        steps = training_steps(field, x, rounds, options.gradients, save)
        save(steps)
        scores = densities(field, x, rounds)
        harness.write(f"gpu-{features}", [steps, scores], options.out)


def training_steps(
    field: TimeMLP,
    x: Tensor,
    rounds: int,
    gradients: Sequence[str],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Everyone's likelihood training step, with the memory that it takes.

    Compiling takes minutes of a device that may be lent for few: what is known is saved after
    every entrant.
    """
    truth = continuous.ours(field, x.double(), None, EXACT).look()
    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name, step in everyone(field, x, gradients):
        first = seconds(step.call, x)
        found, memory = peak(step.look, x)
        gc.collect()  # of what compiling leaves, which would otherwise fall into some later call
        second = seconds(step.call, x)
        notes[name] = {
            **continuous.compared(found, truth),
            "peak MB": None if "diffrax" in name else memory,
            "first call s": first,
        }
        calls[name] = step.call
        harness.say(f"D = {field.features}, {name}: first {first:.1f} s, later {second:.4f} s")
        notes[name]["one call ms"] = 1e3 * second
        early = [{"": other, **notes[other]} for other in calls]
        save(harness.table(f"So far, D = {field.features}, batch {len(x):,}", early))
    work = notes["cnf checkpoint"]["NFE"], notes["cnf checkpoint"]["NFE backward"]
    tangents = field.features if field.features < HIDDEN[0] // 2 else None
    calls[ALONE] = captured(alone(field, x, tangents, *work), x)
    notes[ALONE] = dict(zip(("NFE", "NFE backward"), work, strict=True))
    return _table("Likelihood training step", calls, notes, field, x, rounds)


def densities(field: TimeMLP, x: Tensor, rounds: int) -> dict[str, Any]:
    """Everyone's log-densities at one tolerance, with their errors."""
    exact = continuous.flow_with(field, EXACT, torch.float64).to(x.device)
    calls, notes = {}, {}
    with torch.no_grad():
        truth = exact.log_prob(x.double())
    for name, log_prob in scorers(field):
        scored = torch.no_grad()(lambda log_prob=log_prob: log_prob(x))
        scored()
        found, memory = peak(scored, x)
        error = (found.double() - truth).abs().quantile(0.99)
        notes[name] = {"error": float(error), "peak MB": memory}
        calls[name] = scored
        harness.say(f"D = {field.features}, {name}: log_prob")
    return _table("Log-density with exact trace", calls, notes, field, x, rounds)


def _table(
    title: str,
    calls: dict[str, Callable[[], object]],
    notes: dict[str, dict[str, Any]],
    field: TimeMLP,
    x: Tensor,
    rounds: int,
) -> dict[str, Any]:
    rows = harness.race(calls, FFJORD, rounds, synchronize=lambda: wait(x))
    shape = "–".join(map(str, (field.features, *HIDDEN, field.features)))
    return harness.table(
        f"{title}, D = {field.features}, batch {len(x):,}, {x.device.type}",
        [{**row.cells(), **notes[row.name]} for row in rows],
        f"{shape} concatsquash tanh, exact divergence, float32, dopri5 at {TOLERANCE:g}, {rounds} "
        "rounds. Errors against float64 at 1e-10; of log-densities the 99th percentile. "
        f"{ALONE.capitalize()}: those of cnf checkpoint, on a GPU as one CUDA graph.",
    )


def everyone(field: TimeMLP, x: Tensor, gradients: Sequence[str]) -> Iterator[tuple[str, Step]]:
    """All who train."""
    yield FFJORD, continuous.plain(field, x, None)
    if harness.installed("zuko"):
        yield "zuko's solver", continuous.zuko_step(field, x)
    modes: dict[str, dict[str, Any]] = {mode: {} for mode in ("adjoint", "checkpoint", "backprop")}
    for mode in gradients:
        modes |= {f"{mode}, {said}": option for said, option in COMPILED.items()}
    for mode, option in modes.items():
        solver = cnf.Solver(gradient=mode.partition(",")[0], **option, **STEPS)
        yield f"cnf {mode}", continuous.ours(field, x, None, solver)
    if has_jax(x):
        yield "diffrax checkpoint, jit", continuous.diffrax_step(field, x, None, "checkpoint")


def has_jax(x: Tensor) -> bool:
    """Whether diffrax is there, and its JAX computes on a device of the same kind."""
    if not harness.installed("jax", "diffrax"):
        return False
    import jax

    return jax.default_backend() == ("gpu" if x.device.type == "cuda" else "cpu")


def scorers(field: TimeMLP) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """All who score, and how."""
    device = next(field.parameters()).device
    plain = reference.FFJORD(field.features, HIDDEN, tolerance=TOLERANCE).to(device)
    plain.net.take(field)
    yield FFJORD, plain.log_prob
    solver = cnf.Solver(**STEPS)
    for mode, option in {"": {}, **COMPILED}.items():
        flow = continuous.flow_with(field, dataclasses.replace(solver, **option)).to(device)
        yield f"cnf, {mode}" if mode else "cnf", flow.log_prob
    if harness.installed("zuko"):
        from benchmarks.peers_zuko import ZukoSolver

        net = reference.Net(field.features, HIDDEN).to(device).take(field)
        yield "zuko's solver", ZukoSolver(net, TOLERANCE).log_prob


def captured(call: Callable[[], None], x: Tensor) -> Callable[[], object]:
    """A call as one CUDA graph, where its tensors are on such a device."""
    if x.device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up before anything is captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], object], x: Tensor) -> float:
    """What one call takes."""
    wait(x)
    start = time.perf_counter()
    call()
    wait(x)
    return time.perf_counter() - start


def peak(call: Callable[[], T], x: Tensor) -> tuple[T, float | None]:
    """A result, and the most memory that it took beyond what was there before, in MB."""
    if x.device.type != "cuda":
        return call(), None
    wait(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    wait(x)
    return found, (torch.cuda.max_memory_allocated() - before) / 1e6


def wait(x: Tensor) -> None:
    """Until the device is done."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
