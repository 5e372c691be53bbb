"""Densities and samples of trained continuous flows, at equal accuracy, beside peers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cnf
from benchmarks import harness, reference
from benchmarks.continuous import (
    EXACT,
    FFJORD,
    HIDDEN,
    compilers,
    flow_with,
    torchdyn_name,
    torchdyn_peer,
    trained,
)
from cnf.nets import TimeMLP

NATS = 1e-4
"""The error that 99 % of log-densities keep where accuracies are made equal."""
LADDER = [10 ** (-k / 4) for k in range(10, 29)]
"""Tolerances from 3e-3 to 1e-7."""


class Density(NamedTuple):
    """A trained flow at some tolerance.

    Attributes:
        log_prob: log-densities of points.
        decode: the data of latents.
        work: how many evaluations of the velocity one of the two takes, by its name, for points.
    """

    log_prob: Callable[[Tensor], Any]
    decode: Callable[[Tensor], Any]
    work: Callable[[str, Tensor], int]


class Entrant(NamedTuple):
    """One who evaluates: itself at a tolerance, and the truth about its own numbers."""

    at: Callable[[float], Density]
    truth: Density
    ladder: list[float]


def evaluation(
    features: int, batch: int, rounds: int, torchdyn: str | None = None
) -> list[dict[str, Any]]:
    """Log-densities and samples at tolerances that make everyone equally accurate."""
    field, data = trained(features)
    x = data[-batch:]
    z = torch.randn(batch, features, generator=torch.Generator().manual_seed(1))
    entrants = dict(evaluators(field, torchdyn))
    tables = []
    for what, points in (("log_prob", x), ("decode", z)):
        calls, notes = {}, {}
        for name, entrant in entrants.items():
            truth = getattr(entrant.truth, what)(points.double())
            call, notes[name] = accurate_enough(entrant, what, points, truth)
            calls[name] = call
            harness.say(f"{what}, D = {features}, {name}: tolerance {notes[name]['tolerance']:g}")
        rows = harness.race(calls, FFJORD, rounds)
        title = "Log-density with exact trace" if what == "log_prob" else "Samples"
        tables.append(
            harness.table(
                f"{title}, D = {features}, {batch} points",
                [{**row.cells(), **notes[row.name]} for row in rows],
                f"{features}–64–64–64–{features}; each at the loosest tolerance that keeps 99 % of "
                f"its values within {NATS:g} of a float64 solve at 1e-10; {rounds} rounds.",
            )
        )
    return tables


def accurate_enough(
    entrant: Entrant, what: str, points: Tensor, truth: Tensor, wanted: float = NATS
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A call at the loosest tolerance that suffices, or the most exact one, and what it reached."""
    best = (math.inf, math.nan, entrant.truth)
    for tolerance in entrant.ladder:
        tried = entrant.at(tolerance)
        error = error_99(getattr(tried, what)(points), truth)
        if error < best[0]:
            best = error, tolerance, tried
        if error <= wanted:
            break
    error, tolerance, reached = best
    function = getattr(reached, what)
    notes = {"NFE": reached.work(what, points), "tolerance": tolerance, "error": error}
    return lambda: function(points), notes


def error_99(found: Any, truth: Tensor) -> float:
    """The 99th percentile of the errors; of a sample, of its worst coordinate."""
    away = (torch.as_tensor(found).double() - truth).abs()
    return float((away if away.dim() == 1 else away.amax(-1)).quantile(0.99))


def evaluators(field: TimeMLP, torchdyn: str | None) -> Iterator[tuple[str, Entrant]]:
    """All entrants; a peer that is not installed is left out."""
    exact = flow_with(field, EXACT, torch.float64)
    truth = density(exact)
    features = field.features

    def plainly(tolerance: float) -> Density:
        plain = reference.FFJORD(features, HIDDEN, tolerance=tolerance)
        plain.net.take(field)
        return of_net(plain.net, plain.log_prob, plain.decode)

    def ours_at(tolerance: float, **options: Any) -> Density:
        solver = cnf.Solver(rtol=tolerance, atol=tolerance, norm="batch", **options)
        return density(flow_with(field, solver))

    yield FFJORD, Entrant(plainly, truth, LADDER)
    for said, options in compilers().items():
        yield f"cnf{said}", Entrant(functools.partial(ours_at, **options), truth, LADDER)
    default = density(flow_with(field, cnf.Solver()))
    yield "cnf, default solver", Entrant(lambda _: default, truth, [cnf.Solver().rtol])
    if harness.installed("zuko"):
        yield "zuko's solver", Entrant(_zuko(field), truth, LADDER)
    if torchdyn is not None:
        yield torchdyn_name(torchdyn), Entrant(_torchdyn(field, torchdyn), truth, LADDER)
    if harness.installed("jax", "diffrax"):
        yield "diffrax, jit", Entrant(_diffrax(field), truth, LADDER)


def density(flow: cnf.Flow) -> Density:
    """A flow of ours, without gradients."""
    functions = {name: torch.no_grad()(getattr(flow, name)) for name in ("log_prob", "decode")}

    def work(what: str, points: Tensor) -> int:
        with cnf.count_nfe() as nfe:
            functions[what](points)
        return nfe.forward

    return Density(**functions, work=work)


def of_net(
    net: reference.Net, log_prob: Callable[[Tensor], Any], decode: Callable[[Tensor], Any]
) -> Density:
    """A flow that evaluates a net, which counts its calls."""
    functions = {"log_prob": torch.no_grad()(log_prob), "decode": decode}

    def work(what: str, points: Tensor) -> int:
        return net.calls_of(lambda: functions[what](points))

    return Density(**functions, work=work)


def _zuko(field: TimeMLP) -> Callable[[float], Density]:
    from benchmarks.peers_zuko import ZukoSolver

    net = reference.Net(field.features, HIDDEN).take(field)

    def at(tolerance: float) -> Density:
        flow = ZukoSolver(net, tolerance)
        return of_net(net, flow.log_prob, flow.decode)

    return at


def _torchdyn(field: TimeMLP, python: str) -> Callable[[float], Density]:
    peer = torchdyn_peer(field, python)

    def at(tolerance: float) -> Density:
        return Density(
            lambda x: peer.log_prob(x, tolerance),
            lambda z: peer.decode(z, tolerance),
            lambda what, points: peer.work(what, points, tolerance),
        )

    return at


def _diffrax(field: TimeMLP) -> Callable[[float], Density]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import peers_jax

    peer, parameters = peers_jax.Diffrax(), peers_jax.parameters_of(field)

    def at(tolerance: float) -> Density:
        def evaluate(what: str, points: Tensor) -> Any:
            found = getattr(peer, what)(parameters, jnp.asarray(points.numpy()), tolerance)
            return jax.block_until_ready(found)

        return Density(
            lambda x: np.array(evaluate("log_prob", x)[0]),
            lambda z: np.array(evaluate("decode", z)[0]),
            lambda what, points: int(evaluate(what, points)[1]),
        )

    return at
