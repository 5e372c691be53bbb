"""Densities of tables: ours and those of three packages, trained by one loop with one budget."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.families import FAMILIES, PACKAGES, Model, Spec, build
from benchmarks.harness import RESULTS, count, say, table, write

DATA = {"gas30k": "gas30k_d8.npz", "magic": "magic_d10.npz", "protein": "protein_d9.npz"}
LAYERS, BINS, WIDTH, BATCH, LR, CLIP = 5, 8, 64, 256, 2e-3, 5.0
INITIAL = 2048
"""Rows that data-dependent parameters are filled from; the peers take their first batch."""
CHECKS = 8
"""How often the validation rows are scored; the best of these checkpoints is kept."""
NOTE = (
    "Mean test log-likelihood in nats. Every model: {layers} layers, networks of two hidden layers "
    "(or one residual block: nsf and nsf-ar of all but zuko), {bins} bins on [-5, 5], widths "
    "chosen for equal parameters (those of our plain networks of {width}); Adam at {lr:g} "
    "falling to zero along half a cosine, gradients clipped at {clip:g}, {steps:,} steps of "
    "{batch} rows, no averaging, the best of {checks} checkpoints by validation. Means over seeds "
    "(of weights and batches; all models of a seed see the same batches), and ± the standard "
    "deviation of one seed where there are several. `difference` is ours minus the best of the "
    "others."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", type=Path, help="has the files " + ", ".join(DATA.values()))
    parser.add_argument("--steps", type=count, default=1000, help="of every training")
    parser.add_argument("--seeds", type=count, default=1, help="trainings of each model")
    for option, values in (("tables", DATA), ("families", FAMILIES), ("packages", PACKAGES)):
        parser.add_argument(f"--{option}", nargs="+", choices=tuple(values), default=tuple(values))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--keep", action="store_true", help="train only what does not stand there already"
    )


def parts_of(name: str, folder: Path) -> list[Tensor]:
    """A table's rows to train on, to validate on and to test on."""
    with np.load(folder / DATA[name]) as arrays:
        return [torch.from_numpy(arrays[key]).float() for key in ("train", "val", "test")]


def run(options: argparse.Namespace) -> None:
    """Train every family of every package on every table, and write what they reach."""
    file = options.out / "tabular.json"
    found: dict[str, dict[str, Any]] = {}
    if options.keep and file.exists():
        found = {row[""]: row for row in json.loads(file.read_text())["tables"][1]["rows"]}
    # a seed of everything before the next one, so that what is written is fair at any time
    for seed, name, family in itertools.product(
        range(options.seeds), options.tables, options.families
    ):
        parts = parts_of(name, options.folder)
        spec = Spec(family, parts[0].shape[1], LAYERS, BINS, linear=True)
        for package in options.packages:
            key = f"{name}, {family}, {package}"
            row = found.get(key, {"": key})
            if f"seed {seed}" in row:
                continue
            found[key] = trained(row, package, spec, parts, options.steps, seed)
            say(str(found[key]))
            write("tabular", _tables(found, options.steps), options.out, quiet=True)
    write("tabular", _tables(found, options.steps), options.out)


def trained(
    row: dict[str, Any], package: str, spec: Spec, parts: list[Tensor], steps: int, seed: int
) -> dict[str, Any]:
    """Train one model on a table's parts for training and validation, and score the third.

    Args:
        row: what the seeds before reached.
        package: whose model.
        spec: what it is to be like.
        parts: rows for training, validation and test.
        steps: of the optimiser.
        seed: of weights and batches.

    Returns:
        The row with this seed's mean log-likelihood, in nats.
    """
    start = time.process_time()
    model = build(package, spec, WIDTH, seed)
    model.initialize(parts[0][:INITIAL])
    fit(model, parts[0], parts[1], steps, seed)
    scores = score(model, parts[2])
    return {
        **row,
        "parameters": model.count,
        f"seed {seed}": float(scores.mean()),
        "stderr": float(scores.std()) / math.sqrt(len(scores)),
        "CPU seconds": time.process_time() - start,
    }


def reached(row: dict[str, Any]) -> list[float]:
    """Each seed's mean log-likelihood, in nats."""
    return [value for key, value in row.items() if key.startswith("seed ")]


def _tables(found: dict[str, dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, family in itertools.product(DATA, FAMILIES):
        nats = {
            package: reached(found[key])
            for package in PACKAGES
            if (key := f"{name}, {family}, {package}") in found
        }
        row: dict[str, Any] = {"": f"{name}, {family}"}
        for package, values in nats.items():
            # not rounded to three digits: differences of a hundredth of a nat count
            row[package] = f"{np.mean(values):.3f}"
            if len(values) > 1:
                row[package] += f" ± {np.std(values, ddof=1):.3f}"
        others = [np.mean(values) for package, values in nats.items() if package != "cnf"]
        if "cnf" in nats and others:
            row["difference"] = f"{np.mean(nats['cnf']) - np.nanmax(others):+.3f}"
            row["seeds"] = "/".join(str(len(values)) for values in nats.values())
        if nats:
            rows.append(row)
    note = NOTE.format(
        layers=LAYERS,
        bins=BINS,
        width=WIDTH,
        lr=LR,
        clip=CLIP,
        steps=steps,
        batch=BATCH,
        checks=CHECKS,
    )
    every = "`stderr` is over the test rows, and it and the seconds are of the last seed."
    return [
        table("Held-out tables", rows, note),
        table("Every training", list(found.values()), every),
    ]


def fit(model: Model, train: Tensor, val: Tensor, steps: int, seed: int) -> None:
    """Maximise the likelihood; leaves the model with the weights that validation liked best."""
    optimizer = torch.optim.Adam(model.parameters, lr=LR)
    generator = torch.Generator().manual_seed(seed)
    best, state = -math.inf, copy.deepcopy(model.module.state_dict())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(train), (BATCH,), generator=generator)
        optimizer.zero_grad()
        (-model.log_prob(train[rows]).mean()).backward()
        if torch.nn.utils.clip_grad_norm_(model.parameters, CLIP).isfinite():
            optimizer.step()
        if (step + 1) % (steps // CHECKS) == 0:
            value = float(score(model, val).mean())
            if value > best:
                best, state = value, copy.deepcopy(model.module.state_dict())
    model.module.load_state_dict(state)


@torch.no_grad()
def score(model: Model, x: Tensor) -> Tensor:
    """Log-likelihoods of rows, in nats."""
    return torch.cat([model.log_prob(part) for part in x.split(2048)]).double()
