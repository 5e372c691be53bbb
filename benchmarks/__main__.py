"""Measurements: ``python -m benchmarks COMMAND --help``."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks import harness

COMMANDS = {
    "continuous": "training steps, densities and samples of continuous flows, beside peers",
    "levers": "what single levers bring to continuous flows, and cost",
    "quality": "seconds of training until a density is good",
    "discrete": "training steps, densities and samples of discrete flows, beside peers",
    "tabular": "held-out nats on tables",
    "memory": "memory of a training step, and of a million rows",
    "scaling": "cost by batch and by dimension",
    "gpu": "continuous flows on a CUDA device",
    "images": "bits per dimension of images, and pictures of samples",
    "gradients": "exactness of likelihood gradients at training tolerances",
    "quadrature": "log-determinants by quadrature, and in the state",
    "control": "the choice of steps, beside torchdiffeq's",
    "matching": "what flow matching's times and optimiser bring",
    "rnode": "what path costs save in evaluations, and their price",
    "compare": "what a budget of training reaches",
    "accuracy": "numerical accuracy of trained flows",
    "roundtrip": "x to z and back through every model after fitting moons",
    "tanh": "the activation of continuous flows, beside a product",
    "products": "a layer of few inputs, by torch's products and by ours",
    "breakdown": "what the time of compiled steps and samples goes to",
    "revisions": "a compiled training step of this checkout beside other revisions'",
    "table": "fit, score and sample a CSV of 5,000 x 6",
    "summary": "write the tables of the docs anew from the results",
}
"""Each is a module of this package with ``add_arguments(parser)`` and ``run(options)``."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    for name, said in COMMANDS.items():
        command = commands.add_parser(name, help=said)
        command.add_argument(
            "--threads", type=harness.count, default=1, help="threads and cores for all"
        )
        if name == asked:  # the others' peers need not be there
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    options = parser.parse_args()
    harness.pin(options.threads)
    importlib.import_module(f"benchmarks.{options.command}").run(options)


main()
