"""Networks: they know nothing of flows."""

from cnf.nets.activations import activation
from cnf.nets.conditioning import ConditionedMLP
from cnf.nets.conv import ConvNet, GatedAttention, ResNet
from cnf.nets.conv_field import ConvField
from cnf.nets.fields import Field, TimeMLP
from cnf.nets.guidance import Guided, OptionalContext
from cnf.nets.made import MADE, MaskedLinear
from cnf.nets.mlp import MLP
from cnf.nets.potential import PotentialField
from cnf.nets.residual_field import ResidualField

__all__ = [
    "MADE",
    "MLP",
    "ConditionedMLP",
    "ConvField",
    "ConvNet",
    "Field",
    "GatedAttention",
    "Guided",
    "MaskedLinear",
    "OptionalContext",
    "PotentialField",
    "ResNet",
    "ResidualField",
    "TimeMLP",
    "activation",
]
