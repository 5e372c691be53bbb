"""Continuous flows on a CUDA device: training steps and densities of the 2-D and the 63-D net."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnf
from benchmarks import continuous, harness, reference
from benchmarks.continuous import ALONE, EXACT, FFJORD, HIDDEN, TOLERANCE, Step
from cnf.nets import TimeMLP

STEPS: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "norm": "batch"}
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": "reduce-overhead"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=10_000)
    parser.add_argument("--features", type=int, nargs="+", default=[2, 63])
    parser.add_argument(
        "--gradients",
        nargs="+",
        choices=("adjoint", "checkpoint"),
        default=["adjoint", "checkpoint"],
        help="which of ours are compiled",
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    # before anybody imports JAX: memory as it is needed, and products as exact as torch's
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m benchmarks gpu needs a CUDA device, and PyTorch sees none here")
    rounds = options.rounds or {"quick": 3, "usual": 10, "full": 30}[options.effort]
    for features in options.features:
        tables = []
        field, data = continuous.trained(features)
        field, x = copy.deepcopy(field).to(device), data[: options.batch].to(device)
        tables.append(training_steps(field, x, rounds, options.gradients))
        # what is known so far, in case the rest is interrupted
        harness.write(f"gpu-{features}", tables, options.out, quiet=True)
        tables.append(densities(field, x, rounds))
        harness.write(f"gpu-{features}", tables, options.out)


def training_steps(
    field: TimeMLP, x: Tensor, rounds: int, gradients: Sequence[str]
) -> dict[str, Any]:
    """Everyone's likelihood training step, with the memory that it takes."""
    truth = continuous.ours(field, x.double(), None, EXACT).look()
    calls, notes = {}, {}
    for name, step in everyone(field, x, gradients):
        start = time.perf_counter()
        step.call()
        wait(x)
        first = time.perf_counter() - start
        found = step.look()
        notes[name] = {
            **continuous.compared(found, truth),
            "peak MB": None if "diffrax" in name else peak(step.call, x),
            "first call s": first,
        }
        calls[name] = step.call
        harness.say(f"D = {field.features}, {name}: first call {first:.1f} s")
    work = notes["cnf checkpoint"]["NFE"], notes["cnf checkpoint"]["NFE backward"]
    tangents = field.features if field.features < HIDDEN[0] // 2 else None
    calls[ALONE] = captured(continuous.alone(field, x, tangents, *work), x)
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
        error = (scored().double() - truth).abs().quantile(0.99)
        notes[name] = {"error": float(error), "peak MB": peak(scored, x)}
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
    modes = {mode: {} for mode in ("adjoint", "checkpoint", "backprop")}
    for said, option in COMPILED.items():
        modes |= {f"{mode}, {said}": option for mode in gradients}
    for mode, option in modes.items():
        solver = cnf.Solver(gradient=mode.partition(",")[0], **option, **STEPS)
        yield f"cnf {mode}", continuous.ours(field, x, None, solver)
    if harness.installed("zuko"):
        yield "zuko's solver", continuous.zuko_step(field, x)
    if has_jax(x):
        yield "diffrax checkpoint, jit", continuous.diffrax_step(field, x, None, "checkpoint")


def has_jax(x: Tensor) -> bool:
    """Whether diffrax is there, and its JAX computes on a device of the same kind."""
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("diffrax") is None:
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


def peak(call: Callable[[], object], x: Tensor) -> float | None:
    """The most memory that a call holds on its device beyond what was there before, in MB."""
    if x.device.type != "cuda":
        return None
    wait(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait(x)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def wait(x: Tensor) -> None:
    """Until the device is done."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
