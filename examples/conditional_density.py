"""A conditional density p(y | x) with two branches, which no regression line can follow.

python examples/conditional_density.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cnf
from cnf import plots


def branches(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw y = ± x² + noise that grows with |x|, at x uniform on [-2, 2]."""
    x = 4 * torch.rand(rows, 1, generator=generator) - 2
    sign = 2.0 * torch.randint(2, (rows, 1), generator=generator) - 1
    y = sign * x.square() + (0.2 + 0.2 * x.abs()) * torch.randn(rows, 1, generator=generator)
    return y, x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nsf")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    y, x = branches(2_000 if options.quick else 50_000, torch.Generator().manual_seed(0))
    flow = cnf.models[options.model].build(1, context_features=1)
    history = cnf.fit(flow, (y, x), steps=20 if options.quick else None, seconds=60)
    print(history.summary())

    at = torch.tensor([[-1.5], [0.0], [1.5]])
    drawn = flow.sample((1000,), at)
    for value, column in zip(at[:, 0], drawn.unbind(1), strict=True):
        print(f"p(y | x = {value:+.1f}): mean {column.mean():+.2f}, std {column.std():.2f}")

    # p(y | x) over the plane: every point (x, y) of the grid is scored under its own x
    bounds = ((-2.0, 2.0), (-6.0, 6.0))
    picture = plots.density(
        lambda points: flow.log_prob(points[:, 1:], points[:, :1]),
        bounds,
        title="p(y | x): every column is a density of y",
        columns=("x", "y"),
    )
    print(plots.write(picture, options.out / "conditional_density.png"))


if __name__ == "__main__":
    main()
