"""Where data comes from: 2-D targets of known density, the user's own tables and images."""

from __future__ import annotations

from cnf.data.energies import Energy, energies, energy
from cnf.data.images import digits, images
from cnf.data.table import DataError, Table, table
from cnf.data.targets import Target
from cnf.data.toys import targets, toy

__all__ = [
    "DataError", "Energy", "Table", "Target", "digits", "energies", "energy", "images", "table",
    "targets", "toy",
]  # fmt: skip
