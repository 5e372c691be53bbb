"""Devices that compute while Python goes on: few numbers there and back, without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def far(tensor: Tensor) -> bool:
    """Whether a look at its numbers may have to wait for a device that is still at work."""
    return tensor.device.type != "cpu"


def send(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on a device."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    # from pinned memory, because any other copy waits until the device has done all it has
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)


class Answer:
    """Numbers that a device computes, on their way here.

    Example:
        >>> import torch
        >>> from cnf.ode.transfer import Answer
        >>> Answer(torch.tensor([0.5, 2.0])).read()
        [0.5, 2.0]
    """

    def __init__(self, numbers: Tensor):
        self.numbers = numbers
        self.here: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.here = torch.cuda.Event()
            self.here.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers, once the device has come to them."""
        if self.here is not None:
            self.here.synchronize()
        return self.numbers.tolist()
