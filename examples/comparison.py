"""Compare model families on one density, as ``cnf compare`` does, from Python.

python examples/comparison.py --target checkerboard
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cnf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="checkerboard")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/comparison"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    comparison = cnf.compare(
        options.target,
        models=("realnvp", "nsf") if options.quick else ("ffjord", "realnvp", "maf", "nsf"),
        steps=20 if options.quick else None,
        seconds=None if options.quick else 60,
        test_size=2_000 if options.quick else 50_000,
        out=options.out,
        report=print,
    )
    print(comparison)
    best = min((row for row in comparison.rows if row.gap is not None), key=lambda row: row.gap)
    print(f"closest to the truth: {best.model}; see {options.out / 'compare.png'}")


if __name__ == "__main__":
    main()
