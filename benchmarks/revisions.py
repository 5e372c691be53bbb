"""A compiled training step, or samples, of this checkout beside other revisions', in turn.

    python -m benchmarks revisions HEAD~1 --batches 16 512 --probes 1
    python -m benchmarks revisions HEAD~1 --batches 512 --kind samples --features 63

say what a change brought: single changes bring less than a machine drifts between two runs.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks import harness

HERE = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_effort(parser)
    parser.add_argument("revisions", nargs="+", help="what git knows them by")
    parser.add_argument("--batches", type=harness.count, nargs="+", default=[16, 512])
    parser.add_argument(
        "--kind",
        choices=["checkpoint", "adjoint", "samples"],
        default="checkpoint",
        help="samples, or a training step by its gradient",
    )
    parser.add_argument(
        "--probes",
        type=int,
        choices=[0, 1],
        default=0,
        help="of a training step; 0 (default) is the exact divergence",
    )
    parser.add_argument("--features", type=harness.count, default=2, help="D")
    parser.add_argument(
        "--processes", type=harness.count, default=5, help="of each, whose median counts"
    )
    parser.add_argument("--out", type=Path, help="folder for results; without it they are printed")


def run(options: argparse.Namespace) -> None:
    kind, tables = options.kind, []
    if kind == "samples" and options.probes:
        raise SystemExit("samples have no divergence: leave out --probes")
    with tempfile.TemporaryDirectory() as folder:
        places = {"this checkout": HERE}
        for revision in dict.fromkeys(map(_named, options.revisions)):
            places[revision] = _unpacked(revision, Path(folder) / revision)
        alike = options.probes, options.features, options.threads
        for place in places.values():
            # for all batches; a process that has compiled is slower than one that finds its code
            Called(place, kind, options.batches[0], *alike).close()
        for batch in options.batches:
            entrants = [
                (name, Called(place, kind, batch, *alike))
                for _ in range(options.processes)
                for name, place in places.items()
            ]
            rounds = harness.ROUNDS[options.effort]
            calls = {str(i): entrant for i, (_, entrant) in enumerate(entrants)}
            rows = harness.race(calls, "0", rounds)
            for _, entrant in entrants:
                entrant.close()
            found = [(name, row.ms) for (name, _), row in zip(entrants, rows, strict=True)]
            trace = "one probe" if options.probes else "exact divergence"
            step = f"Likelihood training step, {kind}, {trace}"
            what = "Samples" if kind == "samples" else step
            title = f"{what}, D = {options.features}, batch {batch}"
            note = f"{options.processes} processes of each, {rounds} rounds."
            tables.append(harness.table(title, list(_rows(found, [*places])), note))
    if options.out is None:
        for table in tables:
            print(f"{table['title']}\n\n{harness.markdown(table['cells'])}\n")
    else:
        harness.write(f"revisions-{kind}-{options.features}", tables, options.out)


class Called:
    """A training step or samples in a process of its own, which imports what lies in a folder.

    Args:
        place: the folder.
        kind: "samples", or the gradient mode of training.
        batch: samples.
        probes: one, or none for the exact divergence.
        features: D.
        threads: for its operations.
    """

    def __init__(
        self, place: Path, kind: str, batch: int, probes: int, features: int, threads: int
    ):
        # by its source, because older revisions do not have it
        program = f"{inspect.getsource(serve)}\nserve()"
        words = [kind, *map(str, (batch, probes, features, threads))]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, *words],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.requests = cast(Any, self.process.stdin)
        self.answers = cast(Any, self.process.stdout)
        if not self.answers.readline():
            raise SystemExit(f"nothing runs in {place}; what is wrong stands above")

    def __call__(self) -> None:
        """Call once."""
        self.requests.write(b"\n")
        self.requests.flush()
        self.answers.readline()

    def close(self) -> None:
        """End the process."""
        self.requests.close()
        self.process.wait()


def _rows(found: list[tuple[str, float]], names: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each name, from milliseconds of its processes; the last is what all compare with.

    Processes of the same code differ by some percent, by where their memory happens to lie.
    """
    times = {name: [ms for of, ms in found if of == name] for name in names}
    for name, own in times.items():
        middle = statistics.median(own)
        yield {
            "": name,
            "ms": middle,
            "speedup": statistics.median(times[names[-1]]) / middle,
            "processes": f"{harness.number(min(own))} to {harness.number(max(own))}",
        }


def serve() -> None:
    """Call once for each line that comes, and once before."""
    import sys

    import torch

    import cnf
    from benchmarks.continuous import TOLERANCE, cnf_modes, flow_with, ours, trained

    kind, batch, probes, features, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    field, data = trained(features)
    x = data[:batch]
    if kind == "samples":
        solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, compile=True)
        flow = flow_with(field, solver).eval()
        call = torch.no_grad()(lambda: flow.decode(x))
    else:
        probe = torch.ones_like(x) if probes else None  # that there is one: the step draws its own
        call = ours(field, x, probe, cnf_modes()[f"{kind}, compiled"]).call
    call()
    print("ready", flush=True)
    for _ in sys.stdin:
        call()
        print("done", flush=True)


def _named(revision: str) -> str:
    """The short name of a revision."""
    found = _git("rev-parse", "--short", "--verify", f"{revision}^{{commit}}")
    return found.decode().strip()


def _unpacked(revision: str, folder: Path) -> Path:
    """The files of a revision, in a folder."""
    folder.mkdir()
    archive = _git("archive", revision)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def _git(*words: str) -> bytes:
    try:
        done = subprocess.run(["git", *words], cwd=HERE, stdout=subprocess.PIPE, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"git does not know this revision, or is not here: {error}") from error
    return done.stdout
