"""Densities of tables: ours and those of three packages, trained by one loop with one budget."""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.families import FAMILIES, PACKAGES, Model, Spec, build
from benchmarks.harness import RESULTS, table, write

DATA = {"gas30k": "gas30k_d8.npz", "magic": "magic_d10.npz", "protein": "protein_d9.npz"}
LAYERS, BINS, WIDTH, BATCH, LR, CLIP = 5, 8, 64, 256, 1e-3, 5.0
CHECKS = 8
"""How often the validation rows are scored; the best of these checkpoints is kept."""
NOTE = (
    "Mean test log-likelihood in nats. Every model: {layers} layers, two hidden layers each, "
    "{bins} bins on [-5, 5], widths chosen for equal parameters (ours: {width}); Adam at {lr:g} "
    "falling to zero along half a cosine, gradients clipped at {clip:g}, {steps:,} steps of "
    "{batch} rows, no averaging, the best of {checks} checkpoints by validation, one seed. "
    "`difference` is ours minus the best of the others, `stderr` its standard error over the test "
    "rows."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", type=Path, help="has the files " + ", ".join(DATA.values()))
    parser.add_argument("--steps", type=int, default=2000, help="of every training")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches")
    for option, values in (("tables", DATA), ("families", FAMILIES), ("packages", PACKAGES)):
        parser.add_argument(f"--{option}", nargs="+", choices=tuple(values), default=tuple(values))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def run(options: argparse.Namespace) -> None:
    """Train every family of every package on every table, and write what they reach."""
    rows, details = [], []
    for name in options.tables:
        with np.load(options.folder / DATA[name]) as file:
            parts = {key: torch.from_numpy(file[key]).float() for key in ("train", "val", "test")}
        for family in options.families:
            spec = Spec(family, parts["train"].shape[1], LAYERS, BINS, linear=True)
            found = {}
            for package in options.packages:
                start = time.perf_counter()
                model = build(package, spec, WIDTH, options.seed)
                fit(model, parts["train"], parts["val"], options.steps, options.seed)
                found[package] = score(model, parts["test"])
                details.append(
                    {
                        "": f"{name}, {family}, {package}",
                        "parameters": model.count,
                        "nats": float(found[package].mean()),
                        "stderr": float(found[package].std()) / math.sqrt(len(parts["test"])),
                        "seconds": time.perf_counter() - start,
                    }
                )
                print(details[-1], flush=True)
            rows.append(_row(name, family, found))
    note = NOTE.format(
        layers=LAYERS,
        bins=BINS,
        width=WIDTH,
        lr=LR,
        clip=CLIP,
        steps=options.steps,
        batch=BATCH,
        checks=CHECKS,
    )
    every = "Seconds are of a core shared with other work."
    write(
        "tabular",
        [table("Held-out tables", rows, note), table("Every training", details, every)],
        options.out,
    )


def _row(name: str, family: str, found: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"": f"{name}, {family}"}
    # not rounded to three digits: differences of a hundredth of a nat count
    row |= {package: f"{float(scores.mean()):.3f}" for package, scores in found.items()}
    others = {package: scores for package, scores in found.items() if package != "cnf"}
    if "cnf" in found and others:
        best = max(others, key=lambda package: float(others[package].mean()))
        difference = found["cnf"] - others[best]
        row["difference"] = f"{float(difference.mean()):+.3f}"
        row["stderr"] = f"{float(difference.std()) / math.sqrt(len(difference)):.3f}"
    return row


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
