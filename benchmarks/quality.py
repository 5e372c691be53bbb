"""Seconds of training until a continuous flow's density is good, compilation included.

Ours is trained by the recommended recipe, flow matching and then likelihood, whose learning rate
follows a budget: each budget is a training of its own, from new weights. The others train on until
they are good enough or out of time: FFJORD's published script (Adam 1e-3, weight decay 1e-5,
batches of 100, dopri5 at 1e-5, a trainable end time from 0.5), and zuko's and diffrax's flows as
their documentation trains (Adam 1e-3, batches of 512), on standardised data.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cnf
from benchmarks import harness, reference
from cnf.trial import Split, split, stream, train

THRESHOLDS = {
    "8gaussians": (0.04, 0.01),
    "pinwheel": (0.05, 0.02),
    "checkerboard": (0.39, 0.21, 0.1),
}
"""Nats above the target's entropy."""
OURS = {"ffjord+fm": "cnf, flow matching and likelihood", "ffjord+ml": "cnf, likelihood"}
FFJORD = "FFJORD's script"
CHUNK = 1000
Density = Callable[[Tensor], Any]


class Plan(NamedTuple):
    """How much to do.

    Attributes:
        targets: the densities.
        budgets: seconds that our trainings are given, one after the other.
        seconds: for how long FFJORD's script trains, and the others where nothing else is said.
        scored: test points.
    """

    targets: tuple[str, ...]
    budgets: tuple[float, ...]
    seconds: float
    scored: int


PLANS = {
    "quick": Plan(("8gaussians",), (3, 8), 15, 1000),
    "usual": Plan(("8gaussians",), (2, 4, 8, 15, 30), 150, 5000),
    "full": Plan(tuple(THRESHOLDS), (2, 4, 8, 15, 30, 60), 240, 10_000),
}


class Peer(NamedTuple):
    """One who trains step by step.

    Attributes:
        step: one optimiser step on a batch.
        density: how to score now.
        batch: rows per step.
        standardized: whether it is given standardised data.
    """

    step: Callable[[Tensor], object]
    density: Density
    batch: int
    standardized: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--targets", nargs="+", choices=THRESHOLDS, help="only these")
    parser.add_argument(
        "--seconds", type=harness.amount, help="for how long FFJORD's script trains"
    )
    parser.add_argument(
        "--others", type=harness.amount, help="for how long the rest, if not as long"
    )
    parser.add_argument("--recipes", nargs="+", choices=OURS, default=[*OURS], help="of ours")
    parser.add_argument(
        "--budgets", type=harness.amount, nargs="+", help="what our trainings are given"
    )
    parser.add_argument("--alone", action="store_true", help="ours only, in a file of its own")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    plan = PLANS[options.effort]
    seconds = options.seconds or plan.seconds
    for target in options.targets or plan.targets:
        data = split(cnf.data.toy(target), test_size=plan.scored)
        goals = THRESHOLDS[target]
        curves = {}
        for recipe in options.recipes:
            curves[OURS[recipe]] = list(
                ours(recipe, data, options.budgets or plan.budgets, goals[-1])
            )
        for name, build in () if options.alone else peers().items():
            limit = seconds if name == FFJORD else options.others or seconds
            curves[name] = list(trained(name, build(), data, limit, goals[-1]))
        rows = [_row(name, curve, goals) for name, curve in curves.items()]
        points = [
            {"": name, "seconds": s, "steps": steps, "gap": gap}
            for name, curve in curves.items()
            for s, steps, gap in curve
        ]
        entropy = float(cnf.data.toy(target).entropy)
        note = (
            f"Seconds of training, compilation included, evaluation not, until the mean gap to the "
            f"true log-density of {plan.scored:,} test points (entropy {entropy:.4f} nats) is "
            "below the threshold. cnf: the smallest budget that suffices."
        )
        tables = [
            harness.table(f"{target}: seconds to quality", rows, note),
            harness.table(f"{target}: gap in nats over time", points),
        ]
        name = f"quality-{target}{'-ours' if options.alone else ''}"
        harness.write(name, tables, options.out)


Curve = list[tuple[float, int, float]]


def _row(name: str, curve: Curve, goals: tuple[float, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"": name}
    for goal in goals:
        reached = [seconds for seconds, _, gap in curve if gap <= goal]
        row[f"to {goal:g} nats"] = reached[0] if reached else f"> {curve[-1][0]:.0f}"
    best = min(curve, key=lambda point: point[2])
    return {**row, "best gap": best[2], "after s": best[0], "steps": best[1]}


def ours(
    recipe: str, data: Split, budgets: tuple[float, ...], goal: float
) -> Iterator[tuple[float, int, float]]:
    """Our trainings: seconds, steps and gap of each."""
    for budget in budgets:
        start = time.perf_counter()
        flow, history = train(recipe, data, seconds=budget, progress=False)
        seconds = time.perf_counter() - start
        gap = gap_of(torch.no_grad()(flow.log_prob), data.test, data)
        harness.say(f"{recipe}: {seconds:.1f} s, {history.steps} steps, gap {gap:.4f}")
        yield seconds, history.steps, gap
        if gap <= goal:
            return


def gap_of(density: Density, points: Tensor, data: Split, offset: float = 0.0) -> float:
    """How far the mean log-density lies below the truth."""
    scores = [torch.as_tensor(density(part)).double() for part in points.split(CHUNK)]
    return float((data.truth - torch.cat(scores) - offset).mean())


def trained(
    name: str, peer: Peer, data: Split, seconds: float, goal: float
) -> Iterator[tuple[float, int, float]]:
    """Train a peer: seconds, steps and gap at growing intervals."""
    x, test, offset = data.train, data.test, 0.0
    if peer.standardized:
        loc, scale = x.mean(0), x.std(0)
        x, test, offset = (x - loc) / scale, (test - loc) / scale, -float(scale.log().sum())
    generator = stream(0, name)
    spent, upcoming = 0.0, min(5.0, seconds)
    for steps in itertools.count(1):
        rows = x[torch.randint(len(x), (peer.batch,), generator=generator)]
        start = time.perf_counter()
        peer.step(rows)
        spent += time.perf_counter() - start
        if spent < upcoming:
            continue
        gap = gap_of(peer.density, test, data, offset)
        harness.say(f"{name}: {spent:.1f} s, {steps} steps, gap {gap:.4f}")
        yield spent, steps, gap
        if gap <= goal or spent >= seconds:
            return
        upcoming = min(1.25 * spent, max(seconds, spent))


def peers() -> dict[str, Callable[[], Peer]]:
    """The others, as far as they are installed."""
    found: dict[str, Callable[[], Peer]] = {FFJORD: ffjord}
    if harness.installed("zuko"):
        found["zuko CNF"] = zuko
    if harness.installed("jax", "diffrax", "optax"):
        found["diffrax CNF"] = diffrax
    return found


def ffjord() -> Peer:
    """FFJORD's toy script."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        flow = reference.FFJORD(2, tolerance=1e-5, end_time=0.5)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, weight_decay=1e-5)
    return Peer(_step(flow.log_prob, optimizer), torch.no_grad()(flow.log_prob), 100, False)


def zuko() -> Peer:
    """zuko's flow, three layers of 64."""
    import zuko

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        flow = zuko.flows.CNF(2, hidden_features=(64, 64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)

    @torch.no_grad()
    def density(x: Tensor) -> Tensor:
        return flow().log_prob(x)

    return Peer(_step(lambda x: flow().log_prob(x), optimizer), density, 512, True)


def _step(
    log_prob: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[Tensor], object]:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return step


def diffrax() -> Peer:
    """diffrax's recursive checkpointing on FFJORD's net, one compiled step with optax's Adam."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from benchmarks import peers_jax

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        field = cnf.ffjord(2).transform.field
    peer = peers_jax.Diffrax(1e-5)
    optimizer = optax.adam(1e-3)
    parameters = peers_jax.parameters_of(field)
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters: Any, state: Any, x: Any) -> tuple[Any, Any, Any]:
        (loss, _), gradient = peer.value_and_grad(parameters, x, None)
        changes, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, changes), state, loss

    def step(x: Tensor) -> None:
        nonlocal parameters, state
        parameters, state, loss = update(parameters, state, jnp.asarray(x.numpy()))
        if not math.isfinite(float(loss)):  # waits, too
            raise FloatingPointError("diffrax's loss is not finite")

    def density(x: Tensor) -> Any:
        return np.array(peer.log_prob(parameters, jnp.asarray(x.numpy()), 1e-5)[0])

    return Peer(step, density, 512, True)
