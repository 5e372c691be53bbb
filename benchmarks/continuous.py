"""Continuous flows beside FFJORD's method and peers: training steps, densities, samples.

Everyone has the same net with the same numbers, data, tolerance, error norm (root mean square over
the batch), threads and cores, and everyone's loss, gradient or density is compared with a float64
solve at 1e-10.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import cnf
from benchmarks import harness, reference
from benchmarks.roofline import ALONE, alone
from cnf.nets import TimeMLP

if TYPE_CHECKING:
    from benchmarks.peers_torchdyn import Torchdyn

HIDDEN = (64, 64, 64)
TOLERANCE = 1e-5
NATS = 1e-4
"""The error that 99 % of log-densities keep where accuracies are made equal."""
LADDER = [10 ** (-k / 4) for k in range(10, 29)]
"""Tolerances from 3e-3 to 1e-7."""
FFJORD = "FFJORD's method"


class Found(NamedTuple):
    """What one training step computed, and its evaluations of the velocity."""

    loss: float
    gradient: Tensor
    forward: int | None
    backward: int | None


@dataclasses.dataclass
class Step:
    """A likelihood training step without the optimiser.

    Attributes:
        call: loss and gradient, timed.
        look: the same with its values and its work.
    """

    call: Callable[[], object]
    look: Callable[[], Found]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("--part", choices=("steps", "evaluation"), help="only this part")
    parser.add_argument(
        "--batches", type=harness.count, nargs="+", help="batch sizes of the training steps"
    )
    parser.add_argument("--features", type=harness.count, nargs="+", help="D of the evaluations")
    parser.add_argument(
        "--torchdyn", metavar="PYTHON", help="the interpreter of an environment that has torchdyn"
    )
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for results")


def run(options: argparse.Namespace) -> None:
    rounds = harness.ROUNDS[options.effort]
    if options.torchdyn is not None:
        _torchdyn_name(options.torchdyn)  # says at once what is wrong with its environment
    tables: list[dict[str, Any]] = []
    for found in _tables(options, rounds):
        tables += found
        # what is known so far, in case the rest is interrupted
        name = f"continuous-{options.part}" if options.part else "continuous"
        harness.write(name, tables, options.out)


def _tables(options: argparse.Namespace, rounds: int) -> Iterator[list[dict[str, Any]]]:
    quick = options.effort == "quick"
    if options.part != "evaluation":
        for hutchinson in (False,) if quick else (False, True):
            for batch in options.batches or ([16, 512] if quick else [16, 100, 512, 4096]):
                steps = training_steps(batch, rounds, options.torchdyn, hutchinson=hutchinson)
                yield [steps]
    if options.part != "steps":
        for features in options.features or ([2] if quick else [2, 43, 63]):
            turns = rounds if features == 2 else max(3, rounds // 3)
            yield evaluation(features, 512, turns, options.torchdyn)


# --- a field that has somewhere to go -----------------------------------------------------------


@functools.cache
def trained(features: int, steps: int = 200) -> tuple[TimeMLP, Tensor]:
    """A field after some training, and standardised data: 8gaussians, or a mixture beyond 2-D."""
    generator = torch.Generator().manual_seed(0)
    if features == 2:
        x = cnf.data.toy("8gaussians").sample(20_000, generator)
    else:
        means = 1.5 * torch.randn(8, features, generator=generator)
        spread = torch.randn(features, features, generator=generator) / features**0.5
        noise = torch.randn(20_000, features, generator=generator)
        x = means[torch.randint(8, (20_000,), generator=generator)] + noise @ spread
    x = (x - x.mean(0)) / x.std(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        flow = cnf.ffjord(features, hidden=HIDDEN, solver=cnf.Solver(gradient="backprop"))
    objective = cnf.MaximumLikelihood(flow) if features == 2 else cnf.FlowMatching(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps if features == 2 else 3 * steps):
        rows = x[torch.randint(len(x), (256,), generator=generator)]
        optimizer.zero_grad()
        objective(cnf.Batch(rows), generator=generator).total.backward()
        optimizer.step()
    return flow.transform.field, x


def flow_with(field: TimeMLP, solver: cnf.Solver, dtype: torch.dtype = torch.float32) -> cnf.Flow:
    """A flow of ours with a copy of the field's numbers."""
    flow = cnf.ffjord(field.features, hidden=HIDDEN, solver=solver)
    flow.transform.field.load_state_dict(field.state_dict())
    return flow.to(dtype)


# --- training steps -----------------------------------------------------------------------------


def compared(found: Found, truth: Found) -> dict[str, Any]:
    """A training step's work, and how far it is from the truth."""
    error = (found.gradient.double() - truth.gradient).norm() / truth.gradient.norm()
    return {
        "NFE": found.forward,
        "NFE backward": found.backward,
        "loss error": abs(found.loss - truth.loss),
        "gradient error": float(error),
    }


def training_steps(
    batch: int, rounds: int, torchdyn: str | None = None, *, hutchinson: bool = False
) -> dict[str, Any]:
    """Everyone's likelihood training step at one batch size."""
    field, data = trained(2)
    x = data[:batch]
    probe = None
    if hutchinson:
        t = torch.ones(())
        generator = torch.Generator().manual_seed(0)
        probe = cnf.Hutchinson().draw(field, t, x, None, generator)[0]
    truth = ours(field, x.double(), probe, EXACT).look()
    entrants, notes = {}, {}
    for name, step in everyone(field, x, probe, torchdyn):
        start = time.perf_counter()
        step.call()
        first = time.perf_counter() - start
        found = step.look()
        notes[name] = {**compared(found, truth), "first call s": first}
        entrants[name] = step.call
        harness.say(f"batch {batch}, {name}: first call {first:.1f} s")
    work = notes["cnf checkpoint"]
    entrants[ALONE] = alone(field, x, 1 if hutchinson else 2, work["NFE"], work["NFE backward"])
    notes[ALONE] = {"NFE": work["NFE"], "NFE backward": work["NFE backward"]}
    rows = harness.race(entrants, FFJORD, rounds)
    kind = "Hutchinson, one probe" if hutchinson else "exact divergence"
    return harness.table(
        f"Likelihood training step, batch {batch:,}, {kind}",
        [{**row.cells(), **notes[row.name]} for row in rows],
        f"2–64–64–64–2 concatsquash tanh, dopri5 at {TOLERANCE:g}, {rounds} rounds; 8gaussians "
        "after 200 steps of training. Errors against float64 at 1e-10: of the loss in nats, of the "
        f"gradient relative to its norm. {ALONE.capitalize()}: those of cnf checkpoint.",
    )


EXACT = cnf.Solver("dopri8", rtol=1e-10, atol=1e-10, gradient="checkpoint", norm="batch")


def everyone(
    field: TimeMLP, x: Tensor, probe: Tensor | None, torchdyn: str | None
) -> Iterator[tuple[str, Step]]:
    """All entrants; a peer that is not installed is left out."""
    yield FFJORD, plain(field, x, probe)
    for mode in cnf_modes():
        yield f"cnf {mode}", ours(field, x, probe, cnf_modes()[mode])
    if probe is None and harness.installed("zuko"):
        yield "zuko's solver", zuko_step(field, x)
    if torchdyn is not None:
        yield _torchdyn_name(torchdyn), torchdyn_step(field, x, probe, torchdyn)
    if harness.installed("jax", "diffrax"):
        from benchmarks.peers_jax import ADJOINTS

        for adjoint in ADJOINTS:
            yield f"diffrax {adjoint}, jit", diffrax_step(field, x, probe, adjoint)


def cnf_modes() -> dict[str, cnf.Solver]:
    """Our ways to a gradient."""
    solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, norm="batch")
    modes = {
        mode: dataclasses.replace(solver, gradient=mode)
        for mode in ("adjoint", "checkpoint", "backprop")
    }
    for said, options in compilers().items():
        for mode in ("adjoint", "checkpoint"):
            modes[f"{mode}{said}"] = dataclasses.replace(solver, gradient=mode, **options)
    return modes


def compilers() -> dict[str, dict[str, Any]]:
    """Eager and compiled: what to call each, and its options."""
    return {"": {}, ", compiled": {"compile": True}}


def ours(field: TimeMLP, x: Tensor, probe: Tensor | None, solver: cnf.Solver) -> Step:
    """Our step; the probe is drawn from a seed, the same that ``probe`` was drawn from."""
    flow = flow_with(field, solver, x.dtype).to(x.device)
    divergence = None if probe is None else cnf.Hutchinson()
    objective = cnf.MaximumLikelihood(flow, divergence=divergence, tolerance=None)
    own = flow.transform.field

    def call() -> Tensor:
        flow.zero_grad()
        generator = None if probe is None else torch.Generator(x.device).manual_seed(0)
        loss = objective(cnf.Batch(x), generator=generator).total
        loss.backward()
        return loss.detach()

    def look() -> Found:
        with cnf.count_nfe() as nfe:
            loss = call()
        backward = None if solver.gradient == "backprop" else nfe.backward
        return Found(float(loss), reference.gradient(own), nfe.forward, backward)

    return Step(call, look)


def plain(field: TimeMLP, x: Tensor, probe: Tensor | None) -> Step:
    """FFJORD's method."""
    flow = reference.FFJORD(field.features, HIDDEN, tolerance=TOLERANCE).to(x.device)
    flow.net.take(field)
    return torch_step(flow, flow.net, lambda: flow.log_prob(x, probe))


def zuko_step(field: TimeMLP, x: Tensor) -> Step:
    """zuko's solver and gradient on the same net."""
    from benchmarks.peers_zuko import ZukoSolver

    net = reference.Net(field.features, HIDDEN).to(x.device).take(field)
    flow = ZukoSolver(net, TOLERANCE)
    return torch_step(flow, net, lambda: flow.log_prob(x))


def torchdyn_step(field: TimeMLP, x: Tensor, probe: Tensor | None, python: str) -> Step:
    """torchdyn's solver and adjoint on the same net, in an environment of its own."""
    return _torchdyn_peer(field, python).step(x, TOLERANCE, probe)


def _torchdyn_name(python: str) -> str:
    from benchmarks import peers_torchdyn

    return f"torchdyn {peers_torchdyn.version(python)}"


def _torchdyn_peer(field: TimeMLP, python: str) -> Torchdyn:
    from benchmarks.peers_torchdyn import Torchdyn

    return Torchdyn(python, reference.Net(field.features, HIDDEN).take(field))


def torch_step(flow: torch.nn.Module, net: reference.Net, log_prob: Callable[[], Tensor]) -> Step:
    """A step of likelihood by whoever evaluates a net that counts its calls."""

    def call() -> Tensor:
        flow.zero_grad()
        loss = -log_prob().mean()
        loss.backward()
        return loss.detach()

    def look() -> Found:
        flow.zero_grad()
        before = net.calls
        loss = -log_prob().mean()
        between = net.calls
        loss.backward()
        return Found(float(loss.detach()), net.gradient(), between - before, net.calls - between)

    return Step(call, look)


def diffrax_step(field: TimeMLP, x: Tensor, probe: Tensor | None, adjoint: str) -> Step:
    """diffrax's step, compiled; it does not tell the evaluations of its backward pass."""
    import jax.numpy as jnp

    from benchmarks import peers_jax

    peer = peers_jax.Diffrax(TOLERANCE, adjoint)
    parameters, points = peers_jax.parameters_of(field), jnp.asarray(x.cpu().numpy())
    noise = None if probe is None else jnp.asarray(probe.numpy())

    def call() -> tuple[Any, Any, int]:
        return peer.step(parameters, points, noise)

    def look() -> Found:
        loss, gradient, nfe = call()
        return Found(float(loss), peers_jax.flatten(gradient), nfe, None)

    return Step(call, look)


# --- densities and samples ----------------------------------------------------------------------


class Density(NamedTuple):
    """A trained flow at some tolerance."""

    log_prob: Callable[[Tensor], Any]
    decode: Callable[[Tensor], Any]


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
    best = (math.inf, math.nan, getattr(entrant.truth, what))
    for tolerance in entrant.ladder:
        function = getattr(entrant.at(tolerance), what)
        error = error_99(function(points), truth)
        if error < best[0]:
            best = error, tolerance, function
        if error <= wanted:
            break
    error, tolerance, function = best
    return lambda: function(points), {"tolerance": tolerance, "error": error}


def error_99(found: Any, truth: Tensor) -> float:
    """The 99th percentile of the errors; of a sample, of its worst coordinate."""
    away = (torch.as_tensor(found).double() - truth).abs()
    return float((away if away.dim() == 1 else away.amax(-1)).quantile(0.99))


def evaluators(field: TimeMLP, torchdyn: str | None) -> Iterator[tuple[str, Entrant]]:
    """All entrants; a peer that is not installed is left out."""
    exact = flow_with(field, EXACT, torch.float64)
    truth = density(exact)
    features = field.features
    ffjord = reference.FFJORD(features, HIDDEN)
    ffjord.net.take(field)

    def plainly(tolerance: float) -> Density:
        ffjord.tolerance = tolerance
        return Density(torch.no_grad()(ffjord.log_prob), ffjord.decode)

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
        yield _torchdyn_name(torchdyn), Entrant(_torchdyn(field, torchdyn), truth, LADDER)
    if harness.installed("jax", "diffrax"):
        yield "diffrax, jit", Entrant(_diffrax(field), truth, LADDER)


def density(flow: cnf.Flow) -> Density:
    """A flow of ours, without gradients."""
    return Density(torch.no_grad()(flow.log_prob), torch.no_grad()(flow.decode))


def _zuko(field: TimeMLP) -> Callable[[float], Density]:
    from benchmarks.peers_zuko import ZukoSolver

    net = reference.Net(field.features, HIDDEN).take(field)

    def at(tolerance: float) -> Density:
        flow = ZukoSolver(net, tolerance)
        return Density(torch.no_grad()(flow.log_prob), flow.decode)

    return at


def _torchdyn(field: TimeMLP, python: str) -> Callable[[float], Density]:
    peer = _torchdyn_peer(field, python)

    def at(tolerance: float) -> Density:
        return Density(lambda x: peer.log_prob(x, tolerance), lambda z: peer.decode(z, tolerance))

    return at


def _diffrax(field: TimeMLP) -> Callable[[float], Density]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import peers_jax

    peer, parameters = peers_jax.Diffrax(), peers_jax.parameters_of(field)

    def at(tolerance: float) -> Density:
        def evaluate(function: Callable[..., Any], points: Tensor) -> Any:
            found = function(parameters, jnp.asarray(points.numpy()), tolerance)
            return np.array(jax.block_until_ready(found))

        return Density(lambda x: evaluate(peer.log_prob, x), lambda z: evaluate(peer.decode, z))

    return at
