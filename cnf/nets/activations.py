"""Activation functions by name, so that a network's recipe is plain data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnf.registry import unknown_name


class Sine(nn.Module):
    """sin(x), elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sine."""
        return torch.sin(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sine": Sine,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation(name: str) -> nn.Module:
    """A new activation module, ``(*shape)`` to ``(*shape)``.

    Raises:
        UnknownNameError: if no activation has that name; the message lists them.

    Example:
        >>> activation("tanh")
        Tanh()
    """
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()
