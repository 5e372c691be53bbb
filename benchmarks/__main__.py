"""Commands: ``python -m benchmarks accuracy RUNS`` and ``python -m benchmarks table``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import accuracy, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("accuracy", help="numerical accuracy of trained flows")
    command.add_argument("runs", type=Path, help="what `cnf compare TARGET --out RUNS` wrote")
    command.add_argument("--points", type=int, default=5000)
    command = commands.add_parser("table", help="fit, score and sample a CSV of 5,000 x 6")
    command.add_argument("--seconds", type=float, default=60)
    command.add_argument("--model", default="nsf")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, help="a JSON file for the figures")
    chosen = parser.parse_args()
    if chosen.command == "accuracy":
        found = accuracy.run(chosen.runs, chosen.points)
    else:
        found = table.run(chosen.seconds, chosen.model)
    print(json.dumps(found, indent=2))
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=2) + "\n")


main()
