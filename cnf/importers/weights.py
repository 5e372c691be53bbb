"""Copying weights between networks whose hidden units stand in different orders."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnf.flow import Flow
from cnf.nets import MADE, MLP

ACTIVATIONS: dict[Any, str] = {
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    functional.elu: "elu",
    functional.gelu: "gelu",
    functional.leaky_relu: "leaky_relu",
    functional.relu: "relu",
    functional.silu: "silu",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}


class ImportedFlowError(ValueError):
    """A flow of another package has a part that has no counterpart here; the message names it."""


def activation_name(activation: Any) -> str:
    """The name of an activation function or module."""
    key = type(activation) if isinstance(activation, nn.Module) else activation
    if key not in ACTIVATIONS:
        raise ImportedFlowError(
            f"the activation {activation!r} has no counterpart here; known: "
            f"{', '.join(sorted(set(ACTIVATIONS.values())))}"
        )
    return ACTIVATIONS[key]


def refuse(part: Any, known: str) -> ImportedFlowError:
    """The error for a part that cannot be taken over."""
    return ImportedFlowError(
        f"{type(part).__module__}.{type(part).__name__} cannot be taken over; {known}"
    )


def finished(flow: Flow) -> Flow:
    """The flow, marked as one that data must not initialise."""
    flow.initialized.fill_(True)
    return flow


@torch.no_grad()
def fill_mlp(net: MLP, layers: Sequence[nn.Linear], last: Tensor, scale: Tensor) -> None:
    """Copy linear layers.

    Args:
        net: takes them.
        layers: the other's, first to last.
        last: for each of our outputs, which of the other's it is.
        scale: what each of our outputs is multiplied by.
    """
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    weights[-1] = weights[-1][last] * scale.unsqueeze(1)
    biases[-1] = biases[-1][last] * scale
    for ours, weight, bias in zip(net.layers, weights, biases, strict=True):
        ours.weight.copy_(weight)  # type: ignore[operator]
        ours.bias.copy_(bias)  # type: ignore[operator]


@torch.no_grad()
def fill_made(made: MADE, layers: Sequence[Any], last: Tensor, scale: Tensor) -> None:
    """Copy masked linear layers; hidden units are matched by the features that they may see.

    Args:
        made: takes them.
        layers: the other's, first to last, each with ``weight``, ``bias`` and ``mask``. Where it
            has a context, the first takes it after the features.
        last: for each of our outputs, which of the other's it is.
        scale: what each of our outputs is multiplied by.

    Raises:
        ImportedFlowError: if the units of the two do not see the same sets of features.
    """
    D = made.features
    columns = torch.arange(layers[0].weight.shape[1])
    theirs_seen = torch.eye(len(columns), D, dtype=torch.bool)
    ours_seen = torch.eye(D, dtype=torch.bool)
    for index, (ours, theirs) in enumerate(zip(made.layers, layers, strict=True)):
        mask, own_mask = theirs.mask.bool().cpu(), ours.mask.bool().cpu()  # type: ignore[operator]
        theirs_seen, ours_seen = _reach(mask, theirs_seen), _reach(own_mask, ours_seen)
        final = index == len(layers) - 1
        rows = last if final else _match(ours_seen, theirs_seen)
        weight = (theirs.weight * mask.to(theirs.weight))[rows][:, columns]
        bias = theirs.bias[rows]
        if final:
            weight, bias = weight * scale.unsqueeze(1), bias * scale
        if index == 0 and made.context_layer is not None:
            made.context_layer.weight.copy_(weight[:, D:])
            weight = weight[:, :D]
        if bool((weight[~own_mask.to(weight.device)] != 0).any()):
            raise _unmatched()
        ours.weight.copy_(weight)  # type: ignore[operator]
        ours.bias.copy_(bias)  # type: ignore[operator]
        columns = rows
    if made.direct is not None:
        nn.init.zeros_(made.direct.weight)
        nn.init.zeros_(made.direct.bias)


def dependencies(masks: Sequence[Tensor], features: int) -> Tensor:
    """Which feature reaches which output through masked layers, ``(outputs, features)``."""
    seen = torch.eye(masks[0].shape[1], features, dtype=torch.bool)
    for mask in masks:
        seen = _reach(mask.bool().cpu(), seen)
    return seen


def _reach(mask: Tensor, seen: Tensor) -> Tensor:
    """The features that each output of a masked layer sees, from those that its inputs see."""
    return mask.float() @ seen.float() > 0


def _match(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each of our units the one of theirs that takes its place: it sees the same features."""
    places = defaultdict(list)
    for index, row in enumerate(theirs.tolist()):
        places[tuple(row)].append(index)
    queues = {row: iter(indices) for row, indices in places.items()}
    chosen = [next(queues.get(tuple(row), iter(())), -1) for row in ours.tolist()]
    if len(ours) != len(theirs) or -1 in chosen:
        raise _unmatched()
    return torch.tensor(chosen, dtype=torch.long)


def _unmatched() -> ImportedFlowError:
    return ImportedFlowError(
        "the hidden units of this masked network see other sets of features than ours would: "
        "layers narrower than the number of features and random masks cannot be taken over"
    )


def interleaved(blocks: Sequence[int], features: int) -> Tensor:
    """Places that turn outputs block by block into outputs feature by feature.

    >>> interleaved([1, 1], 3)
    tensor([0, 3, 1, 4, 2, 5])
    """
    starts = [0, *itertools.accumulate(size * features for size in blocks)]
    parts = [
        start + torch.arange(size * features).reshape(features, size)
        for start, size in zip(starts, blocks, strict=False)
    ]
    return torch.cat(parts, -1).flatten()
