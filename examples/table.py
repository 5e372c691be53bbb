"""A density of a table: write a CSV, fit it, find its least likely rows, draw more like it.

python examples/table.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import cnf
from cnf import plots
from cnf.data.table import write_table


def weather(rows: int, seed: int = 0) -> np.ndarray:
    """Made-up days: temperature, humidity that falls with it, and skewed wind."""
    random = np.random.default_rng(seed)
    temperature = 12 + 8 * np.sin(2 * np.pi * random.random(rows)) + random.normal(0, 2, rows)
    humidity = 100 / (1 + np.exp(0.15 * (temperature - 18) - random.normal(0, 0.5, rows)))
    wind = random.gamma(2.0, 2.0, rows) * (1 + 0.02 * humidity)
    return np.column_stack([temperature, humidity, wind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nsf")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    file = options.out / "weather.csv"
    write_table(
        file, ["temperature", "humidity", "wind"], weather(1_000 if options.quick else 20_000)
    )
    table = cnf.data.table(file)

    flow = cnf.models[options.model].build(len(table.columns))
    history = cnf.fit(flow, table, steps=20 if options.quick else None, seconds=60)
    print(history.summary())

    x = table.x.to(flow.dtype)
    with torch.no_grad():
        scores = flow.log_prob(x)
    for row in scores.argsort()[:3]:
        print(f"unlikely: {x[row].tolist()}, log-density {scores[row]:.1f} nats")

    samples = flow.sample((5000,))
    print(write_table(options.out / "more_weather.csv", table.columns, samples))
    low, high = np.quantile(table.x.numpy(), (0.001, 0.999), axis=0)
    picture = plots.comparison(
        [plots.Panel("table", x[:5000]), plots.Panel(options.model, samples)],
        [plots.Curve(options.model, [(s, nats) for _, s, nats in history.validations])],
        bounds=tuple(zip(low, high, strict=True)),
        columns=table.columns,
        title=file.name,
    )
    print(plots.write(picture, options.out / "table.png"))


if __name__ == "__main__":
    main()
