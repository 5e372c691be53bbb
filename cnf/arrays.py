"""When arrays of NumPy stand for tensors: few numbers on a CPU, which torch is slow to start on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def fits_arrays(*values: Tensor) -> bool:
    """Whether arrays can stand for these tensors: no gradient is wanted, and NumPy knows them."""
    return (
        not torch.is_grad_enabled()
        and all(value.device.type == "cpu" for value in values)
        and {value.dtype for value in values} in ({torch.float32}, {torch.float64})
        and not torch.compiler.is_dynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
