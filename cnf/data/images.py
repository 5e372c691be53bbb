"""Images as tensors of whole numbers, for flows that dequantise."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnf.data.errors import DataError, nearest


def images(
    path: str | Path,
    *,
    key: str | None = None,
    shape: Sequence[int] | None = None,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images of an NPY or NPZ file as a tensor ``(N, channels, height, width)`` of 0, …, 255.

    The values stay whole numbers: give them to a flow that was built with ``dequantize="uniform"``
    or ``"variational"``.

    Args:
        path: an array ``(N, height, width)`` or ``(N, channels, height, width)``, usually uint8.
        key: which array of an NPZ file; may be left away if there is one only.
        shape: of one image, ``(height, width)`` or ``(channels, height, width)``, for arrays whose
            images are flat, such as MNIST's 784 numbers: ``shape=(28, 28)``.
        channels_last: the array is ``(N, height, width, channels)``.
        dtype: of the result.

    Raises:
        DataError: if the file is no such array, or holds other numbers.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flat.npy")
        ...     np.save(path, np.zeros((5, 784), np.uint8))
        ...     images(path, shape=(28, 28)).shape
        torch.Size([5, 1, 28, 28])
    """
    path = Path(path)
    array = _read(path, key)
    if array.dtype.kind not in "buif":
        raise DataError(f"{path} holds {array.dtype}, not numbers from 0 to 255")
    if shape is not None:
        size = int(np.prod(shape))
        if array.ndim < 2 or int(np.prod(array.shape[1:])) != size:
            raise DataError(
                f"{path} holds an array of shape {array.shape}, whose images have not the {size} "
                f"numbers of shape={tuple(shape)}"
            )
        array = array.reshape(len(array), *shape)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and channels_last:
        array = np.moveaxis(array, -1, 1)
    if array.ndim != 4:
        raise DataError(
            f"{path} holds an array of shape {array.shape}; images are (N, height, width) or (N, "
            "channels, height, width): pass shape=(height, width) if they are flat"
        )
    if array.shape[1] > 4 and array.shape[-1] <= 4:
        raise DataError(
            f"{path} holds images of shape {array.shape[1:]}: pass channels_last=True if the "
            f"{array.shape[-1]} are their channels"
        )
    if array.dtype != np.uint8 and not bool(
        np.all((array >= 0) & (array <= 255) & (array == np.floor(array)))
    ):
        raise DataError(
            f"{path} holds other numbers than 0, 1, …, 255 (from {array.min():g} to "
            f"{array.max():g}): save the pixels as uint8, e.g. (255 * x).round().astype('uint8')"
        )
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def digits(*, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 1,797 handwritten digits that come with scikit-learn, ``(1797, 1, 8, 8)`` of 0, …, 16.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "cnf[sklearn]"'
        ) from error
    return torch.from_numpy(load_digits().images).unsqueeze(1).to(dtype)


def _read(path: Path, key: str | None) -> NDArray[Any]:
    """The array, read without running anything."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with open(path, "rb") as raw:
            loaded = np.load(raw, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            known = list(loaded.files)
            if key is None and len(known) == 1:
                key = known[0]
            if key in known:
                array: NDArray[Any] = loaded[key]
                return array
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is no NPY or NPZ file of numbers, or it is damaged ({error})"
        ) from None
    if key is None:
        raise DataError(f"{path} holds several arrays, {', '.join(known)}: name one by key=…")
    raise DataError(
        f"{path} holds no array {key!r}.{nearest(key, known)} It holds: {', '.join(known)}"
    )
