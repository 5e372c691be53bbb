"""Discrete flows in turn with other packages': training steps, densities, samples."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import FAMILIES, PACKAGES, Model, Spec, build
from benchmarks.harness import (
    RESULTS,
    ROUNDS,
    Entrant,
    Row,
    add_effort,
    count,
    installed,
    race,
    table,
    write,
)

LAYERS, BINS, WIDTH = 5, 8, 64
NAMES = {
    "realnvp": "affine coupling",
    "maf": "affine autoregressive",
    "nsf": "spline coupling",
    "nsf-ar": "spline autoregressive",
}
CALLS = ("train", "log_prob", "sample")
NOTE = (
    "{batch} × {features}, {layers} layers, two hidden layers (ours and flowjax's of {width}, the "
    "other PyTorch packages' as wide as gives equal parameters), {bins} bins, float32, "
    "milliseconds{of}. `train` is loss and gradient. `eager ×` and `compiled ×` say how many times "
    "faster ours is than the fastest other PyTorch package, `flowjax ×` how many times faster "
    "ours, compiled, is than flowjax, which JAX compiles: medians over rounds of the quotient "
    "within a round, each followed by its quartiles. Compiling is not counted; `Flow.compile` "
    "leaves autoregressive sampling of many features eager, because all of its steps would be "
    "unrolled."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_effort(parser)
    parser.add_argument("--features", type=count, nargs="+")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS)
    parser.add_argument("--batch", type=count, default=512)
    parser.add_argument("--rounds", type=count)
    parser.add_argument("--eager", action="store_true", help="leave out what has to be compiled")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's own seconds, on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def run(options: argparse.Namespace) -> None:
    """Race every family at every dimension and write the tables."""
    if not installed(*PACKAGES[1:]):
        return
    compiled = not options.eager
    rounds = options.rounds or ROUNDS[options.effort]
    tables = []
    for features in options.features or ([2] if options.effort == "quick" else [2, 43]):
        rows = []
        for family in options.families:
            spec = Spec(family, features, LAYERS, BINS, linear=False)
            calls = _calls(spec, options.batch, compiled)
            for name in options.calls:
                title = f"{NAMES[family]}, {name}"
                rows.append(_row(title, calls[name], rounds, options.cpu_time))
                print(rows[-1], flush=True)
        of = " of CPU time (other work had the core, too)" if options.cpu_time else ""
        note = NOTE.format(
            batch=options.batch, features=features, layers=LAYERS, width=WIDTH, bins=BINS, of=of
        )
        tables.append(table(f"Discrete flows in {features} dimensions", rows, note))
    write("discrete", tables, options.out)


def _calls(spec: Spec, batch: int, compiled: bool) -> dict[str, dict[str, Entrant]]:
    """For each call the entrants by name."""
    x = torch.randn(batch, spec.features, generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, Entrant]] = {call: {} for call in CALLS}
    models = {package: build(package, spec, WIDTH) for package in PACKAGES}
    if compiled:
        # all flows share the code that is compiled, and it is compiled for so many of them only
        torch.compiler.reset()
        models["compiled"] = build("cnf", spec, WIDTH)
        models["compiled"].module.compile()
    for name, model in models.items():
        found["train"][name] = _training(model, x)
        found["log_prob"][name] = _scoring(model, x)
        found["sample"][name] = _sampling(model, batch)
    if compiled and installed("flowjax"):
        for call, entrant in _flowjax(spec, batch).items():
            found[call]["flowjax"] = entrant
    return found


def _training(model: Model, x: torch.Tensor) -> Entrant:
    parameters = model.parameters

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        (-model.log_prob(x).mean()).backward()

    return step


def _scoring(model: Model, x: torch.Tensor) -> Entrant:
    return torch.no_grad()(lambda: model.log_prob(x))


def _sampling(model: Model, batch: int) -> Entrant:
    return torch.no_grad()(lambda: model.sample(batch))


def _flowjax(spec: Spec, batch: int) -> dict[str, Callable[[], Any]]:
    import equinox
    import jax
    from flowjax import bijections, distributions, flows

    spline = bijections.RationalQuadraticSpline(knots=spec.bins, interval=5)
    coupled = spec.family in ("realnvp", "nsf")
    flow = (flows.coupling_flow if coupled else flows.masked_autoregressive_flow)(
        jax.random.key(0),
        base_dist=distributions.Normal(jax.numpy.zeros(spec.features)),
        transformer=spline if spec.family.startswith("nsf") else None,
        flow_layers=spec.layers,
        nn_width=WIDTH,
        nn_depth=2,
    )
    arrays, rest = equinox.partition(flow, equinox.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (batch, spec.features))

    @jax.jit
    def log_prob(arrays: Any, x: Any) -> Any:
        return equinox.combine(arrays, rest).log_prob(x)

    @jax.jit
    def sample(arrays: Any, key: Any) -> Any:
        return equinox.combine(arrays, rest).sample(key, (batch,))

    train = jax.jit(jax.value_and_grad(lambda arrays, x: -log_prob(arrays, x).mean()))
    key, done = jax.random.key(2), jax.block_until_ready
    return {
        "train": lambda: done(train(arrays, x)),
        "log_prob": lambda: done(log_prob(arrays, x)),
        "sample": lambda: done(sample(arrays, key)),
    }


def _row(name: str, entrants: dict[str, Entrant], rounds: int, cpu_time: bool) -> dict[str, Any]:
    # a package that takes seconds for one call need not do so often
    slow = name == "spline autoregressive, sample"
    clock = time.process_time if cpu_time else time.perf_counter
    rounds, warmup = (min(rounds, 3), 1) if slow else (rounds, 3)
    found = {row.name: row for row in race(entrants, "cnf", rounds, warmup, clock=clock)}
    row: dict[str, Any] = {"": name}
    row |= {name: found[name].ms for name in (*PACKAGES, "compiled", "flowjax") if name in found}
    best = min((found[package] for package in PACKAGES[1:]), key=lambda other: other.ms)
    row["eager ×"], row["quartiles"] = _faster(found["cnf"], best)
    if "compiled" in found:
        ours = found["compiled"]
        row["compiled ×"], row["compiled quartiles"] = _faster(ours, best)
        if "flowjax" in found:
            row["flowjax ×"], row["flowjax quartiles"] = _faster(ours, found["flowjax"])
    return row


def _faster(ours: Row, other: Row) -> tuple[float, str]:
    low, middle, high = ours.against(other)
    return middle, f"{low:.2f} to {high:.2f}"
