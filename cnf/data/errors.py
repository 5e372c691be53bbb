"""What goes wrong with a user's own data, and what is doubtful about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the place and the way out."""


class DataWarning(UserWarning):
    """Data that can be used, but of which something should be known."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that proposes the known name nearest to ``name``; empty where none is near.

    >>> nearest("wieght", ["height", "weight"])
    " Did you mean 'weight'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" Did you mean {near[0]!r}?" if near else ""
