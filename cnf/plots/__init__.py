"""Pictures: densities, samples, training histories, and model families beside each other.

The only room that imports matplotlib, and only when a picture is drawn. Every function returns a
plain ``matplotlib.figure.Figure``; ``write`` puts one into a file, whole or not at all.
"""

from __future__ import annotations

from cnf.plots.canvas import require, write
from cnf.plots.comparison import Curve, Panel, comparison
from cnf.plots.density import Bounds, density, evaluate, grid
from cnf.plots.history import history
from cnf.plots.images import images

__all__ = [
    "Bounds",
    "Curve",
    "Panel",
    "comparison",
    "density",
    "evaluate",
    "grid",
    "history",
    "images",
    "require",
    "write",
]
