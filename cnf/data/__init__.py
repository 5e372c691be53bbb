"""Where data comes from: 2-D targets whose density is known, and the user's own tables."""

from __future__ import annotations

from cnf.data.energies import Energy, energies, energy
from cnf.data.table import DataError, Table, table
from cnf.data.targets import Target
from cnf.data.toys import targets, toy

__all__ = [
    "DataError", "Energy", "Table", "Target", "energies", "energy", "table", "targets", "toy",
]  # fmt: skip
