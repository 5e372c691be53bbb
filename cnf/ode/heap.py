"""Free memory that the process keeps, where glibc would hand it back to the system."""

from __future__ import annotations

import ctypes
import functools
import os

# glibc's numbers for: how much may lie free at the heap's end, and which blocks never come from it
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30
# what users set who have a mind of their own about it
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed() -> None:
    """Have glibc keep up to a gigabyte of free memory; other allocators are left as they are.

    Each operation of a solve frees blocks that the next one asks for. Handed back in between, they
    come as pages that fault and are zeroed, which takes up to three quarters of a large batch's
    time (``python -m benchmarks scaling``).
    """
    if any(name in os.environ for name in CHOSEN):
        return
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not Linux, or not glibc
        return
    for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
        tell(threshold, KEPT)
