"""Maps between base and data, and what they are composed of."""

from cnf.transforms.autoregressive import Autoregressive
from cnf.transforms.base import Chain, Inverse, Mapped, Request, Transform
from cnf.transforms.coupling import Coupling, alternating_mask, half_mask, random_mask

__all__ = [
    "Autoregressive",
    "Chain",
    "Coupling",
    "Inverse",
    "Mapped",
    "Request",
    "Transform",
    "alternating_mask",
    "half_mask",
    "random_mask",
]
