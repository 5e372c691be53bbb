"""Fair timing: everyone in turn, round by round, so that the machine's drift hits all alike."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

START = time.time()
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
PEERS = ("torchdiffeq", "zuko", "nflows", "normflows", "jax", "diffrax", "flowjax")
TURN = 0.05
"""Seconds that a turn lasts at least: shorter calls are repeated in it, as a training repeats them.

Whoever comes after another finds caches that are not its own, which is most of a turn of 5 ms.
"""

ROUNDS = {"quick": 3, "usual": 10, "full": 30}
"""Turns that each entrant has, by the effort that is asked for."""

Entrant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What one entrant's calls took.

    Attributes:
        name: the entrant.
        ms: median time of a call, in milliseconds.
        speedup: how many times faster than the reference: the median over rounds of the quotient
            within a round, which drift between rounds does not touch.
        low: the quotients' lower quartile.
        high: their upper quartile.
        rounds: how many rounds there were.
        seconds: what a call took in each round.
    """

    name: str
    ms: float
    speedup: float
    low: float
    high: float
    rounds: int
    seconds: tuple[float, ...] = ()

    def against(self, other: Row) -> tuple[float, float, float]:
        """How many times faster this is than another of its race: lower quartile, median, upper."""
        return quartiles(other.seconds, self.seconds)

    def cells(self) -> dict[str, Any]:
        """The row as a table shows it."""
        return {
            "": self.name,
            "ms": self.ms,
            "speedup": self.speedup,
            "quartiles": f"{number(self.low)} to {number(self.high)}",
        }


def quartiles(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile over rounds of the quotient within a round."""
    low, middle, high = np.quantile(np.divide(slow, fast), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def race(
    entrants: Mapping[str, Entrant],
    reference: str,
    rounds: int = 10,
    warmup: int = 2,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Call all entrants in turn, ``rounds`` times, and compare their times with the reference's.

    Args:
        entrants: what to call, by name; each call waits until its work is done.
        reference: the name of the one that the others are compared with.
        rounds: turns that each entrant has.
        warmup: calls of each before the first round, untimed.
        synchronize: waits for a device, where calls return before they are done.
        clock: seconds; ``time.process_time`` leaves out those that other work had the core for.
    """
    if reference not in entrants:
        raise ValueError(f"the reference {reference!r} is none of {', '.join(entrants)}")
    repeats = {name: _repeats(call, warmup, synchronize, clock) for name, call in entrants.items()}
    names = list(entrants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            # whoever comes first finds other caches than whoever comes last
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds[name].append(_turn(entrants[name], repeats[name], synchronize, clock))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    rows = []
    for name in names:
        own = tuple(seconds[name])
        low, middle, high = quartiles(seconds[reference], own)
        rows.append(Row(name, 1e3 * float(np.median(own)), middle, low, high, rounds, own))
    return rows


def _repeats(
    call: Entrant,
    warmup: int,
    synchronize: Callable[[], object] | None,
    clock: Callable[[], float],
) -> int:
    for _ in range(max(warmup, 1)):
        call()
    return max(1, math.ceil(TURN / max(_turn(call, 1, synchronize, clock), 1e-7)))


def _turn(
    call: Entrant,
    repeats: int,
    synchronize: Callable[[], object] | None,
    clock: Callable[[], float],
) -> float:
    wait = synchronize or (lambda: None)
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return (clock() - start) / repeats


def installed(*modules: str) -> bool:
    """Whether all of these can be imported; says so where they cannot."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        print(f'skipped: {", ".join(missing)} not installed (pip install "cnf[bench]")')
    return not missing


def say(line: str) -> None:
    """Tell a person who waits how far it is."""
    print(line, file=sys.stderr, flush=True)


def pin(threads: int) -> None:
    """Keep this process, JAX's threads among it, to so many threads and cores."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    facts |= {name: version(name) for name in PEERS if importlib.util.find_spec(name) is not None}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    if "LD_PRELOAD" in os.environ:
        facts["preloaded"] = Path(os.environ["LD_PRELOAD"]).name
    if "torch._inductor.compile_fx" in sys.modules:
        facts["compiler cache"] = compiler_cache()
    return facts


def compiler_cache() -> str:
    """Whether Inductor's folder was ``"empty"`` when this process started, or ``"warm"``."""
    from torch._inductor.codecache import cache_dir

    for folder, _, files in os.walk(cache_dir()):
        for name in files:
            # another process may take it away
            with contextlib.suppress(OSError):
                if os.stat(os.path.join(folder, name)).st_mtime < START:
                    return "warm"
    return "empty"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(title: str, rows: Sequence[Mapping[str, Any] | Row], note: str = "") -> dict[str, Any]:
    """A table of a result: ``Row`` records, or mappings from column to value."""
    cells = [row.cells() if isinstance(row, Row) else dict(row) for row in rows]
    figures = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    return {"title": title, "note": note, "rows": figures, "cells": cells}


def command(folder: Path | None = None) -> str:
    """What was started.

    Where files lie is no part of what was measured, and may name somebody's folders.

    Args:
        folder: one that was named without an option.
    """
    given = ["FOLDER" if folder and Path(word) == folder else word for word in sys.argv[1:]]
    words = re.sub(r" --(out|picture|runs)[ =]\S+", "", " ".join(["", *given]))
    words = re.sub(r"(--torchdyn[ =])\S+", r"\1PYTHON", words)
    return f"python -m benchmarks{words}"


def write(
    name: str, tables: Sequence[Mapping[str, Any]], folder: Path = RESULTS, *, quiet: bool = False
) -> Path:
    """Write ``NAME.json`` and ``NAME.md``; returns the Markdown's path.

    Args:
        name: of both files.
        tables: made by ``table``.
        folder: where they go.
        quiet: do not print them, too.
    """
    facts = machine()
    said = command()
    figures = [{key: t[key] for key in ("title", "note", "rows")} for t in tables]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": said, "machine": facts, "tables": figures}, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
    known = ", ".join(f"{key} {value}" for key, value in facts.items())
    lines = [f"`{said}` ({known})", ""]
    for t in tables:
        lines += [f"**{t['title']}**", "", *([t["note"], ""] if t["note"] else [])]
        lines += [markdown(t["cells"]), ""]
    page = folder / f"{name}.md"
    page.write_text("\n".join(lines))
    if not quiet:
        print(page.read_text())
    return page


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table whose columns are all keys, in the order they first come."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[number(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: Any) -> str:
    """Three digits of a number; what is missing as a dash.

    >>> number(1234567.0), number(0.012345), number(1.5e-7), number(None)
    ('1,234,567', '0.0123', '1.5e-07', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 5))}f}"


def count(text: str) -> int:
    """A whole number above zero, as an option is given."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above zero, got {text!r}")
    return int(text)


def amount(text: str) -> float:
    """A finite number above zero, as an option is given."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text!r}")
    return value


def add_effort(parser: argparse.ArgumentParser) -> None:
    """The options ``--quick`` and ``--full``; ``options.effort`` is ``"usual"`` without them."""
    group = parser.add_mutually_exclusive_group()
    for effort, said in (("quick", "few rounds, small sizes"), ("full", "everything")):
        group.add_argument(
            f"--{effort}", dest="effort", action="store_const", const=effort, help=said
        )
    parser.set_defaults(effort="usual")


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option ``--out``, for commands with figures of their own form."""
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")


def report(figures: Mapping[str, Any], out: Path | None, folder: Path | None = None) -> None:
    """Print figures as JSON, with the command and the machine, and write them where asked for."""
    facts = {"command": command(folder), "machine": machine()}
    text = json.dumps({**facts, **figures}, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
