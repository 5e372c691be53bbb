"""The tables of README and docs, made from the results where a page says that one stands.

What stands between ``<!-- table: NAME FOLDER -->`` and ``<!-- end -->`` is written here, from the
JSON files of that folder of the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import DOCS, RESULTS, markdown
from benchmarks.quality import FFJORD as SCRIPT
from benchmarks.quality import OURS, THRESHOLDS
from benchmarks.roofline import ALONE, COMPILED

PAGES = [
    DOCS.parent / "README.md",
    *(DOCS / f"{name}.md" for name in ("benchmarks", "continuous", "solvers")),
]
PLACE = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FLOORS = {
    ALONE: "PyTorch's products and tanh",
    COMPILED: "our own products and tanh",
}
"""What no step can leave out, and what the docs call it."""
Cells = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="only say whether pages are up to date"
    )


def run(options: argparse.Namespace) -> None:
    for page in PAGES:
        text = page.read_text()
        if (anew := refreshed(text)) == text:
            continue
        if options.check:
            raise SystemExit(f"{page.name} is stale")
        page.write_text(anew)
        print(f"wrote {page.name}")


def refreshed(text: str) -> str:
    """A page with its tables as the results have them."""

    def table(place: re.Match[str]) -> str:
        name, *folder = place[2].split()
        rows = list(TABLES[name](RESULTS.joinpath(*folder)))
        return f"{place[1]}\n{markdown(rows)}\n\n{place[3]}"

    return PLACE.sub(table, text)


def steps(folder: Path) -> Iterator[Cells]:
    """How many times faster than FFJORD's method everybody trains."""
    yield from _turned(dict(_steps(folder)))


def bounds(folder: Path) -> Iterator[Cells]:
    """Ours beside diffrax's faster, and beside what no step can leave out."""
    columns: dict[str, dict[str, float]] = {}
    for title, speedups in _steps(folder):
        diffrax = max(speedups[f"diffrax {kind}, jit"] for kind in ("checkpoint", "backsolve"))
        cells = columns[title] = {}
        for own in ("cnf adjoint, compiled", "cnf checkpoint, compiled"):
            cells[f"{own}: speed over diffrax's faster"] = speedups[own] / diffrax
            for floor, name in FLOORS.items():
                if floor in speedups:
                    cells[f"{own}: time over {name}"] = speedups[floor] / speedups[own]
    yield from _turned(columns)


def evaluation(folder: Path) -> Iterator[Cells]:
    """How many times faster than FFJORD's method everybody evaluates."""
    yield from _turned({name: _speedups(table) for name, table in _evaluations(folder)})


def beside(folder: Path) -> Iterator[Cells]:
    """How many times faster ours evaluates than zuko's and diffrax's."""
    found = {name: _speedups(table) for name, table in _evaluations(folder)}
    for own, peer in (
        ("cnf", "zuko's solver"),
        ("cnf, compiled", "zuko's solver"),
        ("cnf, compiled", "diffrax, jit"),
    ):
        quotients = {name: row[own] / row[peer] for name, row in found.items()}
        yield {"": f"{own}, times {peer.partition(',')[0]}", **quotients}


def quality(folder: Path) -> Iterator[Cells]:
    """Seconds until a density is good."""
    for target, goals in THRESHOLDS.items():
        rows = {row[""]: row for row in _tables(folder, f"quality-{target}")[0]["rows"]}
        for goal in goals:
            key = f"to {goal:g} nats"
            took = {name: row[key] for name, row in rows.items()}
            ours, theirs = took[OURS["ffjord+fm"]], took[SCRIPT]
            yield {
                "": f"{target}, {goal:g} nats",
                **{name: _seconds(value) for name, value in took.items()},
                "times": _quotient(theirs, ours),
            }


def discrete(folder: Path) -> Iterator[Cells]:
    """How many times faster than the best other PyTorch package, and than flowjax."""
    tables = _tables(folder, "discrete")
    for lines in zip(*[table["rows"] for table in tables], strict=True):
        cells: Cells = {"": lines[0][""]}
        for table, row in zip(tables, lines, strict=True):
            features = re.findall(r"\d+", table["title"])[-1]
            cells |= {
                f"D = {features}, eager": row["eager ×"],
                f"D = {features}, compiled": row["compiled ×"],
                f"D = {features}, compiled, times flowjax": row.get(
                    "flowjax ×", row["flowjax"] / row["compiled"]
                ),
            }
        yield cells


def products(folder: Path) -> Iterator[Cells]:
    """Billions of operations a second."""
    rows = _tables(folder, "products")[1]["rows"]
    columns = {f"n = {row['n']:,}": {k: v for k, v in row.items() if k != "n"} for row in rows}
    yield from _turned(columns)


def breakdown(folder: Path) -> Iterator[Cells]:
    """Which part of the time compiled code takes."""
    for table in _tables(folder, "breakdown"):
        batch = table["title"].rpartition(" ")[2]
        cells: Cells = {"code, % of": f"batch {batch}"}
        for row in table["rows"]:
            cells[row[""].replace("training step, ", "")] = f"{100 - row['rest, %']:.0f}"
        yield cells


def gaps(folder: Path) -> Iterator[Cells]:
    """Nats above the truth after a minute of training, with standard errors."""
    found = {target: _result(folder, f"compare-{target}")["rows"] for target in THRESHOLDS}
    for rows in zip(*found.values(), strict=True):
        yield {"": f"`{rows[0]['model']}`", **dict(zip(found, map(_gap, rows), strict=True))}


def warm(folder: Path) -> Iterator[Cells]:
    """Nats above the truth after flow matching and then likelihood."""
    for path in sorted(folder.glob("warm-start-*.json")):
        found = _result(folder, path.stem)
        yield {"": f"`{found['command']}`", "nats above the truth": _gap(found["rows"][0])}


def costs(folder: Path) -> Iterator[Cells]:
    """What RNODE's costs save after flow matching."""
    return _costs(folder, "rnode-*-1000-warm.json")


def long(folder: Path) -> Iterator[Cells]:
    """What they save after many steps of likelihood, by two seeds."""
    return _costs(folder, "rnode-*-20000*.json")


def matching(folder: Path) -> Iterator[Cells]:
    """What flow matching comes to in equal steps, and the spread between seeds."""
    for row in _tables(folder, "matching")[0]["rows"]:
        yield {column: re.sub(r"; [\d.]+ ms", "", cell) for column, cell in row.items()}


def memory(folder: Path) -> Iterator[Cells]:
    """Megabytes that a training step keeps for its backward pass."""
    for row in _tables(folder, "memory-step")[0]["rows"]:
        yield {
            "tolerance": f"{row['tolerance']:.0e}",
            "accepted steps": row["accepted"],
            "adjoint": row["adjoint"],
            "checkpoint": row["checkpoint"],
            "NFE of backprop": row["NFE backprop"],
            "backprop": row["backprop"],
        }


def quadrature(folder: Path) -> Iterator[Cells]:
    """What log-determinants by quadrature cost and come to beside those in the state."""
    for table in _tables(folder, "quadrature"):
        name = table["title"].partition(", ")[2]
        for row in table["rows"]:
            if float(row["tolerance"]) == 1e-5:
                way = "in the state" if row[""] == "state" else "by quadrature"
                columns = ("error, rms", "NFE", "divergences", "ms")
                yield {"at 1e-5": f"{name}, {way}", **{column: row[column] for column in columns}}


TABLES: dict[str, Callable[[Path], Iterator[Cells]]] = {
    function.__name__: function
    for function in (
        steps, bounds, evaluation, beside, quality, discrete, products, breakdown, gaps, warm,
        matching, costs, long, memory, quadrature,
    )
}  # fmt: skip


def _result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def _tables(folder: Path, name: str) -> list[dict[str, Any]]:
    return _result(folder, name)["tables"]


def _evaluations(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of densities, then those of samples, by what their columns are called."""
    tables = _tables(folder, "continuous-evaluation")
    for start, said in (("Log-density", "`log_prob`"), ("Samples", "samples")):
        for table in tables:
            if table["title"].startswith(start):
                yield f"{said}, {re.findall('D = [0-9]+', table['title'])[0]}", table


def _gap(row: dict[str, Any]) -> str:
    return f"{row['gap']:.4f} ± {row['gap_stderr']:.4f}"


def _costs(folder: Path, pattern: str) -> Iterator[Cells]:
    for path in sorted(folder.glob(pattern), key=lambda path: path.stem):
        _, target, _, *rest = path.stem.split("-")
        name = ", ".join([target, *(word for word in rest if word.startswith("seed"))])
        for row in _tables(folder, path.stem)[0]["rows"]:
            nfe = {column: row[column] for column in ("NFE, sample norm", "NFE, batch norm")}
            yield {"": f"{name}, {row['']}", "gap": row["gap, test"], **nfe}


def _steps(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Speedups of training steps, by what their columns are called."""
    for table in _tables(folder, "continuous-steps"):
        batch, kind = re.fullmatch(r".*, batch ([\d,]+), (\w+).*", table["title"]).groups()
        yield batch if kind == "exact" else f"one probe: {batch}", _speedups(table)


def _speedups(table: dict[str, Any]) -> dict[str, float]:
    return {row[""]: row["speedup"] for row in table["rows"]}


def _turned(columns: dict[str, dict[str, float]]) -> Iterator[Cells]:
    """Columns of numbers by name as rows."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    for name in names:
        yield {"": name, **{title: column.get(name) for title, column in columns.items()}}


def _seconds(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _quotient(theirs: float | str, ours: float | str) -> str:
    if isinstance(ours, str):
        return "–"
    if isinstance(theirs, str):
        return f"> {float(theirs.lstrip('> ')) / ours:.0f}"
    return f"{theirs / ours:.0f}"
