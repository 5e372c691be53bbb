"""Ready-made flows: one function per paper, each registered by name."""

from __future__ import annotations

from cnf.models.continuous import ffjord
from cnf.models.discrete import iaf, maf, nice, nsf, realnvp
from cnf.registry import MODELS

models = MODELS

__all__ = ["ffjord", "iaf", "maf", "models", "nice", "nsf", "realnvp"]
