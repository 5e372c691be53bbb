"""Fit a density whose truth is known, say how far the model is from it, and draw both.

python examples/toy_density.py --target pinwheel --model nsf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cnf
from cnf import plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="pinwheel")
    parser.add_argument("--model", default="nsf")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    target = cnf.data.toy(options.target)
    flow = cnf.models[options.model].build(2)
    history = cnf.fit(flow, target, steps=20 if options.quick else None, seconds=60)

    x = target.sample(10_000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        gap = (target.log_prob(x) - flow.log_prob(x)).mean()
    print(f"{options.model} on {target.name}: {gap:.4f} nats above the truth, {history.summary()}")

    picture = plots.comparison(
        [
            plots.Panel("truth", x[:5000], plots.evaluate(target.log_prob, target.bounds)),
            plots.Panel(
                options.model, flow.sample((5000,)), plots.evaluate(flow.log_prob, target.bounds)
            ),
        ],
        [plots.Curve(options.model, [(s, nats) for _, s, nats in history.validations])],
        bounds=target.bounds,
        truth=target.entropy,
        title=target.name,
    )
    print(plots.write(picture, options.out / "toy_density.png"))


if __name__ == "__main__":
    main()
