"""Ready-made flows: one function per paper, each registered by name."""

from __future__ import annotations

from cnf.models.autoregressive import iaf, maf
from cnf.models.bumps import planar, radial, sylvester
from cnf.models.continuous import ffjord, otflow, rnode
from cnf.models.coupling import nice
from cnf.models.gaussianize import gaussianization
from cnf.models.image import flowpp, glow, realnvp
from cnf.models.mixtures import mixture
from cnf.models.monotone import bnaf, bpf, naf, sospf, unaf
from cnf.models.residual import residual_flow
from cnf.models.spline import ncsf, nsf
from cnf.registry import MODELS

models = MODELS

__all__ = [
    "bnaf",
    "bpf",
    "ffjord",
    "flowpp",
    "gaussianization",
    "glow",
    "iaf",
    "maf",
    "mixture",
    "models",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "otflow",
    "planar",
    "radial",
    "realnvp",
    "residual_flow",
    "rnode",
    "sospf",
    "sylvester",
    "unaf",
]
