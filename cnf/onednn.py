"""Products of matrices by oneDNN, on CPUs that MKL makes less of.

PyTorch multiplies on x86 by MKL, whose code for other makers' processors uses vectors of 256 bits
where they have 512, and is not its best for those of 256. oneDNN, which PyTorch has, too, goes by
what a processor can do. Called from Python it takes longer to start than a small product takes;
compiled code calls its kernels for blocks (``brgemm``), which start at once.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from cnf.arrays import fits_arrays

# A product's work is its numbers times the multiplications in one, and as many more as storing one
# takes as long as. From here on oneDNN is faster, which is 512 points through 64 x 64.
LARGE = 3 << 20
AROUND = 32
TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
# what MKL goes by
ASKED = "mkl_serv_intel_cpu_true"
# at::native::cpublas::brgemm of float32, as linkers know it
BLOCKS = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
BLOCKS_SINCE = "2.13"


def pays() -> bool:
    """Whether large products are faster by oneDNN than by MKL when Python asks for them."""
    return _is_foreign() and _capability() == "AVX512"


def blocks_pay() -> bool:
    """Whether all products in compiled code are faster by oneDNN's kernels for blocks."""
    return _is_foreign() and _capability() in ("AVX2", "AVX512") and has_blocks()


def has_blocks() -> bool:
    """Whether compiled code is known to find those kernels in this torch."""
    return torch.__version__ >= BLOCKS_SINCE and hasattr(_library(TORCH), BLOCKS)


@functools.cache
def _is_foreign() -> bool:
    """Whether MKL takes this processor for one of another maker's, and there is oneDNN."""
    # a library that is loaded before torch may answer in MKL's place
    answers = (getattr(_library(path), ASKED, None) for path in (None, TORCH))
    is_intels = next((answer for answer in answers if answer is not None), None)
    return is_intels is not None and not is_intels() and torch.backends.mkldnn.is_available()


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _library(path: Path | None) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None if path is None else str(path))
    except (OSError, TypeError):  # not Linux
        return None


def product(left: Tensor, right: Tensor, summand: Tensor | None = None) -> Tensor:
    """The product of two matrices, the fast way where no gradient is wanted.

    Args:
        left: ``(rows, inner)``.
        right: ``(inner, columns)``.
        summand: what is added, ``(columns,)`` or ``(rows, columns)``.

    Returns:
        ``(rows, columns)``.

    Example:
        >>> product(torch.ones(3, 2), torch.ones(2, 4)).shape
        torch.Size([3, 4])
    """
    # compilers see products alone, or else their code would be for sizes as large as the first
    large = not torch.compiler.is_compiling() and pays() and _work(left, right) >= LARGE
    if large and _is_plain(left, right):
        result = by_onednn(left, right)
        return result if summand is None else result.add_(summand)
    return torch.mm(left, right) if summand is None else torch.addmm(summand, left, right)


def _work(left: Tensor, right: Tensor) -> int:
    rows, inner = left.shape
    return rows * right.shape[1] * (inner + AROUND)


def _is_plain(left: Tensor, right: Tensor) -> bool:
    exact = left.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return exact and fits_arrays(left, right)


def by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices by oneDNN; no gradient passes."""
    # a linear layer, whose weight is the other way round and may lie as it likes
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
