"""Networks: they know nothing of flows."""

from cnf.nets.activations import activation
from cnf.nets.conv import ConvNet, GatedAttention, ResNet
from cnf.nets.fields import Field, TimeMLP
from cnf.nets.made import MADE, MaskedLinear
from cnf.nets.mlp import MLP

__all__ = [
    "MADE",
    "MLP",
    "ConvNet",
    "Field",
    "GatedAttention",
    "MaskedLinear",
    "ResNet",
    "TimeMLP",
    "activation",
]
