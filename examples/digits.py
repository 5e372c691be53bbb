"""Fit Glow to handwritten digits, report bits per dimension, draw samples.

python examples/digits.py --seconds 60
python examples/digits.py --mnist mnist.npz --seconds 600 --device cuda

The file for ``--mnist`` holds arrays ``train`` and ``test`` of shape (N, 784), uint8; without it
the 8×8 digits of scikit-learn are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import cnf
from cnf import plots

MODELS = {"glow": cnf.glow, "realnvp": cnf.realnvp, "flowpp": cnf.flowpp}


def load(mnist: Path | None) -> tuple[Tensor, Tensor, int]:
    """Images to train and to test on, and how many values a pixel has."""
    if mnist is not None:
        train, test = (cnf.data.images(mnist, key=k, shape=(28, 28)) for k in ("train", "test"))
        return train, test, 256
    x = cnf.data.digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[300:]], x[order[:300]], 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="glow")
    parser.add_argument("--dequantize", choices=["uniform", "variational"], default="uniform")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--mnist", type=Path, help="an NPZ file with train and test, flat uint8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test, bins = load(options.mnist)
    flow = MODELS[options.model](
        train.shape[1:], hidden=(32, 32), dequantize=options.dequantize, bins=bins
    )
    history = cnf.fit(
        flow,
        train,
        steps=3 if options.quick else None,
        seconds=None if options.quick else options.seconds,
        batch_size=128,
        device=options.device,
    )

    noise = torch.Generator(device=flow.device).manual_seed(1)
    with torch.no_grad():
        test = test.to(flow.device)
        found = flow.evaluate(test, request=cnf.Request(generator=noise), chunk=500)
    bits = cnf.bits_per_dimension(found.log_prob, flow.event_shape)
    error = bits.std() / len(bits) ** 0.5
    print(f"{options.model}: {bits.mean():.3f} ± {error:.3f} bits per dimension (an upper bound)")
    print(history.summary())

    data = "digits" if options.mnist is None else options.mnist.stem
    panels = {"held out": test[:32]}
    for temperature in (0.7, 1.0):
        drawn = flow.sample((32,), temperature=temperature, generator=noise)
        panels[f"temperature {temperature}"] = drawn
    picture = plots.images(panels, high=bins - 1, title=options.model)
    print(plots.write(picture, options.out / f"{data}_{options.model}.png"))


if __name__ == "__main__":
    main()
