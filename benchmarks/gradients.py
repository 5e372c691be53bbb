"""How exact a likelihood gradient is at tolerances of training, and the evaluations it takes."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor

import cnf
from benchmarks import harness
from benchmarks.reference import FFJORD, NAMES

TOLERANCES = (1e-2, 1e-3, 1e-4)
MODES = ("adjoint", "checkpoint", "backprop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="checkerboard")
    parser.add_argument(
        "--steps", type=harness.count, default=3000, help="of flow matching, before"
    )
    parser.add_argument("--batch", type=harness.count, default=512)


def run(options: argparse.Namespace) -> None:
    target = cnf.data.toy(options.target)
    x = target.sample(options.batch, torch.Generator().manual_seed(1)).float()
    torch.manual_seed(0)
    flow = cnf.ffjord(2)
    cnf.fit(flow, target, objective="flow-matching", steps=options.steps, progress=False)
    x = flow.scaling.inverse(x).value
    part = flow.transform

    def ours(solver: cnf.Solver) -> tuple[Tensor, int, int]:
        part.solver = solver
        flow.zero_grad()
        with cnf.count_nfe() as work:
            z, log_det, _ = part.inverse(x)
            (-(flow.base.log_prob(z) + log_det).mean()).backward()
        return _flat(flow), work.forward, work.backward

    def theirs(tolerance: float) -> tuple[Tensor, int, int]:
        net = FFJORD(2, tolerance=tolerance)
        net.net.take(part.field)
        loss = -net.log_prob(x).mean()
        forward, net.net.calls = net.net.calls, 0
        loss.backward()
        return net.net.gradient(), forward, net.net.calls

    truth = ours(cnf.Solver("dopri8", rtol=1e-6, atol=1e-6, gradient="checkpoint"))[0]
    rows = []
    for tolerance in TOLERANCES:
        found = {"FFJORD's method": theirs(tolerance)}
        loose = cnf.Solver(rtol=tolerance, atol=tolerance, norm="batch")
        for mode in MODES:
            found[f"cnf, {mode}"] = ours(dataclasses.replace(loose, gradient=mode))
        for name, (gradient, forward, backward) in found.items():
            rows.append(
                {
                    "": name,
                    "tolerance": tolerance,
                    "error": float((gradient - truth).norm() / truth.norm()),
                    "NFE forward": forward,
                    "NFE backward": backward,
                }
            )
    note = (
        f"Relative error of the gradient of {options.batch} points' mean log-density by all "
        f"weights, after {options.steps:,} steps of flow matching on {options.target}; dopri5, "
        "float32, against dopri8 at 1e-6."
    )
    harness.write("gradients", [harness.table("Gradients at training's tolerances", rows, note)])


def _flat(flow: cnf.Flow) -> Tensor:
    """The gradient in the order of the reference's."""
    named = dict(flow.transform.field.layers.named_parameters())
    matrices = sorted(name for name in named if name not in NAMES)
    return torch.cat([named[name].grad.flatten() for name in (*NAMES, *matrices)])
