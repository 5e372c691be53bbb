"""Densities given a class, p(x | class), whose truth is known: each class is a target of its own.

python examples/class_conditional.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import cnf
from cnf import plots

CLASSES = ("8gaussians", "moons", "circles")


def labelled(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of every class, with the class as a one-hot context."""
    x = torch.cat([cnf.data.toy(name).sample(rows, generator) for name in CLASSES])
    return x, torch.eye(len(CLASSES)).repeat_interleave(rows, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ffjord")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    torch.manual_seed(0)
    continuous = cnf.models[options.model].family == "continuous"
    # the exact gradient of the solver's own steps is the cheapest where few steps do
    arguments = {"solver": cnf.Solver(gradient="checkpoint")} if continuous else {}
    flow = cnf.models[options.model].build(2, context_features=len(CLASSES), **arguments)
    history = cnf.fit(
        flow,
        labelled(1_000 if options.quick else 50_000, torch.Generator().manual_seed(0)),
        objective=("flow-matching", "likelihood") if continuous else None,
        steps=20 if options.quick else None,
        seconds=options.seconds,
    )
    print(history.summary())

    panels = []
    for name, context in zip(CLASSES, torch.eye(len(CLASSES)), strict=True):
        target = cnf.data.toy(name)
        found = cnf.kl(
            target,
            flow,
            200 if options.quick else 10_000,
            context=context,
            generator=torch.Generator().manual_seed(1),
        )
        print(f"KL(truth ‖ p(x | {name})): {found.value:.4f} ± {found.stderr:.4f} nats")
        samples = flow.sample(
            (200 if options.quick else 2_000,), context, generator=torch.Generator().manual_seed(2)
        )
        density = plots.evaluate(
            lambda x, context=context: flow.log_prob(x, context),
            target.bounds,
            size=30 if options.quick else 200,
            like=samples,
        )
        panels.append(plots.Panel(name, samples, density, f"KL {found.value:.3f} nats"))
    picture = plots.comparison(panels, bounds=cnf.data.toy(CLASSES[0]).bounds)
    print(plots.write(picture, options.out / "class_conditional.png"))


if __name__ == "__main__":
    main()
