"""Continuous flows beside FFJORD's method and peers: training steps.

Everyone has the same net with the same numbers, data, tolerance, error norm (root mean square over
the batch), threads and cores, and everyone's loss, gradient or density is compared with a float64
solve at 1e-10.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import cnf
from benchmarks import harness, reference
from benchmarks.roofline import ALONE, COMPILED, alone, compiled
from cnf.nets import TimeMLP

if TYPE_CHECKING:
    from benchmarks.peers_torchdyn import Torchdyn

HIDDEN = (64, 64, 64)
TOLERANCE = 1e-5
AT_SOLVERS = functools.partial(cnf.MaximumLikelihood, tolerance=None)
"""Likelihood at the tolerance of a flow's own solver."""
FFJORD = "FFJORD's method"
DEFAULTS = "all defaults"


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
        torchdyn_name(options.torchdyn)  # says at once what is wrong with its environment
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
        from benchmarks.evaluation import evaluation  # which stands on this module

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
    """A training step's work, what it reached, and how far that is from the truth."""
    error = (found.gradient.double() - truth.gradient).norm() / truth.gradient.norm()
    return {
        "NFE": found.forward,
        "NFE backward": found.backward,
        "loss": found.loss,
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
    counts = {key: work[key] for key in ("NFE", "NFE backward")}
    for name, floor in ((ALONE, alone), (COMPILED, compiled)):
        entrants[name] = floor(field, x, 1 if hutchinson else 2, *counts.values())
        notes[name] = counts
    race = harness.race(entrants, FFJORD, rounds)
    kind = "Hutchinson, one probe" if hutchinson else "exact divergence"
    return harness.table(
        f"Likelihood training step, batch {batch:,}, {kind}",
        [_row(row, notes[row.name], notes[FFJORD]) for row in race],
        f"2–64–64–64–2 concatsquash tanh, dopri5 at {TOLERANCE:g}, {rounds} rounds; 8gaussians "
        "after 200 steps of training. `per evaluation` is the speedup of one evaluation on "
        "average: what fewer of them save is left out. Errors against float64 at 1e-10: of the "
        f"loss in nats, of the gradient relative to its norm. {DEFAULTS.capitalize()}: `Solver()` "
        "and `MaximumLikelihood(flow)`, which trains at 1e-3 on average over the batch. "
        f"{ALONE.capitalize()}: those of cnf checkpoint, by PyTorch, all samples at once, and "
        "called by Python one by one in groups of 1,024 as compiled code.",
    )


def _row(row: harness.Row, notes: dict[str, Any], ffjord: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    own, theirs = (
        None if work.get("NFE backward") is None else work["NFE"] + work["NFE backward"]
        for work in (notes, ffjord)
    )
    each = None if own is None or theirs is None else row.speedup * own / theirs
    return {**row.cells(), "per evaluation": each, **notes}


EXACT = cnf.Solver("dopri8", rtol=1e-10, atol=1e-10, gradient="checkpoint", norm="batch")


def everyone(
    field: TimeMLP, x: Tensor, probe: Tensor | None, torchdyn: str | None
) -> Iterator[tuple[str, Step]]:
    """All entrants; a peer that is not installed is left out."""
    yield FFJORD, plain(field, x, probe)
    for mode in cnf_modes():
        yield f"cnf {mode}", ours(field, x, probe, cnf_modes()[mode])
    for said, options in compilers().items():
        solver = cnf.Solver(**options)
        yield f"cnf, {DEFAULTS}{said}", ours(field, x, probe, solver, cnf.MaximumLikelihood)
    if probe is None and harness.installed("zuko"):
        yield "zuko's solver", zuko_step(field, x)
    if torchdyn is not None:
        yield torchdyn_name(torchdyn), torchdyn_step(field, x, probe, torchdyn)
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


def ours(
    field: TimeMLP,
    x: Tensor,
    probe: Tensor | None,
    solver: cnf.Solver,
    likelihood: Callable[..., Any] = AT_SOLVERS,
) -> Step:
    """Our step; the probe is drawn from a seed, the same that ``probe`` was drawn from."""
    flow = flow_with(field, solver, x.dtype).to(x.device)
    objective = likelihood(flow, divergence=None if probe is None else cnf.Hutchinson())
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
    return torchdyn_peer(field, python).step(x, TOLERANCE, probe)


def torchdyn_name(python: str) -> str:
    from benchmarks import peers_torchdyn

    return f"torchdyn {peers_torchdyn.version(python)}"


def torchdyn_peer(field: TimeMLP, python: str) -> Torchdyn:
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
