"""Flows of other packages as flows of this one: the same weights, the same numbers."""

from cnf.importers.nflows import from_nflows
from cnf.importers.zuko import from_zuko

__all__ = ["from_nflows", "from_zuko"]
