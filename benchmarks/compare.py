"""What a budget of training reaches: ``cnf compare``, its figures with the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import cnf
from benchmarks import harness
from cnf.compare import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seconds", type=harness.amount, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder for the picture and the trained flows")
    harness.add_out(parser)


def run(options: argparse.Namespace) -> None:
    found = cnf.compare(
        options.target,
        options.models,
        seconds=options.seconds,
        seed=options.seed,
        out=options.runs,
        report=harness.say,
    )
    harness.report(found.as_dict(), options.out)
