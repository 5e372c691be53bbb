"""When arrays of NumPy stand for tensors: few numbers on a CPU, which torch is slow to start on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

Array = np.ndarray[Any, Any]


def fits_arrays(*values: Tensor) -> bool:
    """Whether arrays can stand for these tensors: no gradient is wanted, and NumPy knows them."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        # torch's name for how many levels of forward differentiation there are, less one
        or forward_ad._current_level >= 0
    ):
        return False
    dtype = values[0].dtype
    # a loop, because generators take several times as long
    for value in values:
        if not value.is_cpu or value.dtype != dtype:
            return False
    return dtype in (torch.float32, torch.float64)
