"""Flows on disk: safetensors for the numbers, JSON for the recipe, nothing that runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cnf.files import write_whole
from cnf.ode import Solver
from cnf.registry import MODELS, Recipe, decode, encode

CONFIG, WEIGHTS = "flow.json", "flow.safetensors"
FORMAT = 1


class LoadError(ValueError):
    """A directory does not hold a flow that this version can build; the message says why."""


def save(flow: Any, directory: str | Path, *, recipe: bool = True) -> None:
    """Write a flow into a directory: ``flow.json`` and ``flow.safetensors``.

    Args:
        flow: the flow.
        directory: is made if need be.
        recipe: False writes the numbers alone, for ``load(dir, into=flow)``: the way for a flow
            that was put together by hand.

    Raises:
        TypeError: if the flow cannot be built again from data; the message says the way out.
    """
    directory = Path(directory)
    if not recipe:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)
        write_state(flow, directory / WEIGHTS)
        return
    known: Recipe | None = getattr(flow, "recipe", None)
    if known is None:
        raise TypeError(
            "this flow was put together by hand, so there is no recipe to save. Build it with a "
            "registered model function, or write its numbers with flow.save(dir, recipe=False) "
            "and read them with cnf.load(dir, into=flow)"
        )
    arguments = {name: encode(value, name) for name, value in known.arguments.items()}
    rebuilt = _build(known.builder, arguments).to(device=flow.device, dtype=flow.dtype)
    if _uncompiled(rebuilt) != _uncompiled(flow):
        raise TypeError(
            f"this flow is no longer what cnf.{known.builder} built: a part was exchanged after. "
            "Register a model function that builds it as it is now, or undo the change"
        )
    config = {
        "format": FORMAT,
        "builder": known.builder,
        "arguments": arguments,
        "dtype": str(flow.dtype).removeprefix("torch."),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_state(flow, directory / WEIGHTS)
    with write_whole(directory / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(
    directory: str | Path,
    *,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Read a flow that ``save`` wrote; ``log_prob`` is the same to the bit on the same machine.

    It comes in eval mode.

    Args:
        directory: where ``flow.json`` and ``flow.safetensors`` are.
        into: a flow of the same structure that takes the numbers; needed only where the flow was
            put together by hand. Nothing is built then.
        device: where the flow goes; the CPU by default.

    Raises:
        LoadError: if files are missing or damaged, or do not fit.
    """
    directory = Path(directory)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise LoadError(f"{directory} holds no {WEIGHTS}: it is not a folder that save() wrote")
    if into is None:
        config = _read_config(directory / CONFIG)
        try:
            dtype = getattr(torch, config["dtype"])
            flow = _build(config["builder"], config["arguments"]).to(device=device, dtype=dtype)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise LoadError(
                f"{directory / CONFIG} cannot be built by this version: {error}"
            ) from error
    else:
        flow = into if device is None else into.to(device)
    try:
        read_state(flow, weights)
    except (RuntimeError, SafetensorError) as error:
        raise LoadError(f"{weights} does not fit the flow: {error}") from error
    return flow.eval()


def write_state(module: nn.Module, path: Path) -> None:
    """Write a module's parameters and buffers, whole or not at all."""
    write_tensors(module.state_dict(), path)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, whole or not at all."""
    # cloned, because safetensors refuses tensors that share memory
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with write_whole(path) as temporary:
        # not by save_file, which hides what the system refuses
        temporary.write_bytes(to_bytes(own, metadata))


def read_state(module: nn.Module, path: Path) -> None:
    """Read what ``write_state`` wrote into a module of the same structure."""
    module.load_state_dict(load_file(path))


def description(module: nn.Module, said: Callable[[Solver], str]) -> str:
    """A module's text line by line, and what is to be said in it in place of each solver."""
    text = _flush(repr(module))
    for part in module.modules():
        solver = getattr(part, "solver", None)
        if isinstance(solver, Solver):
            text = text.replace(_flush(f"solver={solver}"), said(solver))
    return text


def _flush(text: str) -> str:
    """The same lines without what they are indented by, which depends on the modules around."""
    return "\n".join(line.strip() for line in text.splitlines())


def _uncompiled(flow: nn.Module) -> str:
    # compiled code stays in its process, and the solver that had it made goes on without
    return description(flow, lambda solver: str(dataclasses.replace(solver, compile=False)))


def _build(builder: str, arguments: dict[str, Any]) -> Any:
    # building draws initial weights that are thrown away: leave the user's generator alone
    with torch.random.fork_rng(devices=[]):
        return MODELS[builder].build(**decode(arguments))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(
            f"{path} is missing: build the flow in code and call cnf.load(dir, into=flow)"
        ) from None
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise LoadError(f"{path} is not of format {FORMAT}, the one that this version reads")
    return config
