"""A user's table from end to end: write a CSV, then ``cnf fit``, ``score`` and ``sample`` it."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import cnf
from benchmarks import harness
from cnf.data.table import write_table

NAMES = ("temperature", "pressure", "humidity", "wind", "load", "price")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=harness.amount, default=60)
    parser.add_argument("--model", default="nsf")
    harness.add_out(parser)


def run(options: argparse.Namespace) -> None:
    harness.report(through(options.seconds, options.model), options.out)


def correlated(rows: int, seed: int) -> np.ndarray:
    """Six correlated, skewed columns on scales of their own, with a closed-form density."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(6, 6)) / math.sqrt(6) + np.eye(6)
    latent = random.normal(size=(rows, 6)) @ mix.T
    latent[:, 1] += 0.5 * latent[:, 0] ** 2
    latent[:, 5] = np.exp(0.4 * latent[:, 5])
    return latent * [8, 120, 15, 3, 900, 40] + [12, 1013, 60, 0, 4000, 0]


def through(seconds: float, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = correlated(10_000, seed=0)
        write_table(folder / "data.csv", NAMES, data[:5000])
        write_table(folder / "held_out.csv", NAMES, data[5000:])
        command("fit", "data.csv", "--model", model, "--seconds", str(seconds), "--out", "run",
                folder=folder)  # fmt: skip
        command("score", "run", "held_out.csv", "--out", "scores.csv", folder=folder)
        command("sample", "run", "-n", "5000", "--out", "samples.csv", folder=folder)
        scores = cnf.data.table(folder / "scores.csv", fitting=False).x[:, 0].numpy()
        samples = cnf.data.table(folder / "samples.csv", fitting=False)
        reported = json.loads((folder / "run" / "results.json").read_text())
        flow = cnf.load(folder / "run").double()
    gaussian = np.random.default_rng(1).multivariate_normal(
        data.mean(0), 1.5 * np.cov(data.T), 50_000
    )
    weights = np.exp(
        flow.log_prob(gaussian, chunk=10_000).detach().numpy() - normal(gaussian, data)
    )
    return {
        "model": model,
        "seconds": seconds,
        "reported_nats": reported["test_nll"],
        "held_out_nats": -float(scores.mean()),
        "held_out_stderr": float(scores.std() / math.sqrt(len(scores))),
        "integral": float(weights.mean()),
        "integral_stderr": float(weights.std() / math.sqrt(len(weights))),
        "columns": list(samples.columns),
        "two_sample_p_value": two_sample(samples.x.numpy(), data[5000:]),
    }


def command(*arguments: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "cnf", *arguments], cwd=folder, check=True)


def normal(x: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Log-density of the Gaussian that the integral's points come from."""
    covariance = 1.5 * np.cov(data.T)
    away = x - data.mean(0)
    squares = (away @ np.linalg.inv(covariance) * away).sum(1)
    return -0.5 * (squares + np.linalg.slogdet(2 * math.pi * covariance)[1])


def two_sample(a: np.ndarray, b: np.ndarray, permutations: int = 200) -> float:
    """The p-value of a permutation test on the energy distance, on standardised columns."""
    random = np.random.default_rng(0)
    size = min(len(a), len(b), 1000)
    both = np.concatenate([random.permutation(a)[:size], random.permutation(b)[:size]])
    both = (both - both.mean(0)) / both.std(0)
    distances = np.sqrt(((both[:, None] - both[None]) ** 2).sum(-1))

    def energy(order: np.ndarray) -> float:
        sign = np.where(np.isin(np.arange(2 * size), order[:size]), 1.0, -1.0)
        return -float(sign @ distances @ sign)

    observed = energy(np.arange(2 * size))
    larger = sum(energy(random.permutation(2 * size)) >= observed for _ in range(permutations))
    return (1 + larger) / (1 + permutations)
