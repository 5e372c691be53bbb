"""A compiled training step of this checkout beside other revisions', in turn.

    python -m benchmarks revisions HEAD~1 --batches 16 512 --probes 1

says what a change brought: single changes bring less than a machine drifts between two runs.
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
        "--gradient", choices=["checkpoint", "adjoint"], default="checkpoint", help="its mode"
    )
    parser.add_argument(
        "--probes", type=int, choices=[0, 1], default=0, help="0 (default) is the exact divergence"
    )
    parser.add_argument(
        "--processes", type=harness.count, default=5, help="of each, whose median counts"
    )
    parser.add_argument("--out", type=Path, help="folder for results; without it they are printed")


def run(options: argparse.Namespace) -> None:
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        places = {"this checkout": HERE}
        for revision in dict.fromkeys(map(_named, options.revisions)):
            places[revision] = _unpacked(revision, Path(folder) / revision)
        alike = options.probes, options.threads
        for place in places.values():
            # for all batches; a process that has compiled is slower than one that finds its code
            Trained(place, options.gradient, options.batches[0], *alike).close()
        for batch in options.batches:
            entrants = [
                (name, Trained(place, options.gradient, batch, *alike))
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
            title = f"Likelihood training step, {options.gradient}, {trace}, batch {batch}"
            note = f"{options.processes} processes of each, {rounds} rounds."
            tables.append(harness.table(title, list(_rows(found, [*places])), note))
    if options.out is None:
        for table in tables:
            print(f"{table['title']}\n\n{harness.markdown(table['cells'])}\n")
    else:
        harness.write("revisions", tables, options.out)


class Trained:
    """A training step in a process of its own, which imports what lies in a folder.

    Args:
        place: the folder.
        gradient: mode of the solver.
        batch: samples.
        probes: one, or none for the exact divergence.
        threads: for its operations.
    """

    def __init__(self, place: Path, gradient: str, batch: int, probes: int, threads: int):
        # by its source, because older revisions do not have it
        program = f"{inspect.getsource(serve)}\nserve()"
        words = [gradient, str(batch), str(probes), str(threads)]
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
            raise SystemExit(f"a training step does not run in {place}; what it says stands above")

    def __call__(self) -> None:
        """Take a step."""
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
    """Take a step for each line that comes; the first is taken before."""
    import sys

    import torch

    from benchmarks.continuous import cnf_modes, ours, trained

    gradient, batch, probes, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    field, data = trained(2)
    x = data[:batch]
    probe = torch.ones_like(x) if probes else None  # that there is one: the step draws its own
    step = ours(field, x, probe, cnf_modes()[f"{gradient}, compiled"])
    step.call()
    print("ready", flush=True)
    for _ in sys.stdin:
        step.call()
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
