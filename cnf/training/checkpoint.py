"""The latest state of a run in one file: safetensors, with JSON in its header for the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnf.storage import description, write_tensors

NAME = "checkpoint.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, or of another flow or run."""


def write(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint of a run, whole or not at all."""
    write_tensors(tensors, folder / NAME, {"state": json.dumps(state, allow_nan=False)})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint in a folder as (tensors, state), or None if there is none.

    Raises:
        CheckpointError: if the file is no checkpoint of ours.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of a fit ({error}); remove it, or choose another folder"
        ) from error


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a common prefix.

    >>> list(pack("model", {"weight": torch.zeros(1)}))
    ['model/weight']
    """
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``pack``: the tensors under a prefix, without it."""
    start = f"{prefix}/"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The running moments of optimizers by ``optimizer.parameter.name``, the first two numbers."""
    return {
        f"{place}.{number}.{name}": torch.as_tensor(value)
        for place, optimizer in enumerate(optimizers)
        for number, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put moments written by ``optimizer_tensors`` back."""
    for place, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        whole["state"] = {}
        for key, tensor in tensors.items():
            of, number, name = key.split(".", 2)
            if int(of) == place:
                whole["state"].setdefault(int(number), {})[name] = tensor
        optimizer.load_state_dict(whole)


def check_same(what: str, expected: Any, found: Any) -> None:
    """Refuse to continue a run with something else than it began with."""
    if expected != found:
        if isinstance(expected, list) and isinstance(found, list):  # of long ones what differs
            mine = [entry for entry in dict.fromkeys(expected) if entry not in found]
            theirs = [entry for entry in dict.fromkeys(found) if entry not in expected]
            if mine or theirs:
                expected, found = mine, theirs
        raise CheckpointError(
            f"the checkpoint was made with another {what}: it has {found!r}, this fit has "
            f"{expected!r}; call fit as it was called before, or with resume=False"
        )


def structure(module: torch.nn.Module) -> list[str]:
    """What a module is made of beside its tensors and solvers, a line for each part.

    >>> structure(torch.nn.Sequential(torch.nn.ReLU()))
    ['Sequential(', '(0): ReLU()', ')']
    """
    # another solver, or a compiled one, computes the same flow
    lines = description(module, lambda solver: "").split("\n")
    # of parameters in a list it says the device, which may change
    return [line.strip() for line in lines if "Parameter containing:" not in line]


def signature(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names, shapes and dtypes of a module's tensors: what tells one flow from another.

    >>> signature([("weight", torch.zeros(2, 3))])
    ['weight float32 2x3']
    """
    return [
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in parameters
    ]
