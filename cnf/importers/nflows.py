"""From nflows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cnf.bijections import Additive, Affine, Inverted, RationalQuadratic, ScalarMap
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.importers.weights import (
    activation_name,
    fill_made,
    fill_mlp,
    finished,
    interleaved,
    refuse,
)
from cnf.nets import MADE, MLP
from cnf.transforms import (
    Autoregressive,
    Chain,
    Coupling,
    Diagonal,
    Inverse,
    LULinear,
    Permutation,
    Transform,
)

KNOWN = (
    "known are MaskedAutoregressiveFlow, SimpleRealNVP and what is composed of their parts, "
    "rational-quadratic couplings and autoregressive layers, LULinear, permutations and BatchNorm "
    "(as in eval()), all without context, random masks and batch normalisation inside networks"
)


def from_nflows(flow: Any) -> Flow:
    """An nflows flow as a flow of this package, with the same log-density.

    Takes ``MaskedAutoregressiveFlow``, ``SimpleRealNVP`` and flows composed of the same parts,
    rational-quadratic layers, ``LULinear``, permutations and ``BatchNorm`` (as in ``eval()``). The
    weights are copied. The result was put together by hand, so it saves its state only: import
    again and use ``cnf.load(dir, into=…)``.

    Args:
        flow: the other one; its dtype and device are kept.

    Raises:
        ImportedFlowError: if a part of it is not known here; the message names the part.

    Example:
        >>> import torch
        >>> from nflows.flows import MaskedAutoregressiveFlow  # doctest: +SKIP
        >>> theirs = MaskedAutoregressiveFlow(3, 16, 2, 1)  # doctest: +SKIP
        >>> x = torch.randn(5, 3)
        >>> from_nflows(theirs).log_prob(x) - theirs.log_prob(x)  # doctest: +SKIP
        tensor([0., 0., 0., 0., 0.])
    """
    nflows = _nflows()
    if not isinstance(flow, nflows.flows.base.Flow):
        raise refuse(flow, KNOWN)
    base = flow._distribution
    if type(base).__name__ != "StandardNormal":
        raise refuse(base, KNOWN)
    if not isinstance(getattr(flow, "_embedding_net", nn.Identity()), nn.Identity):
        raise refuse(flow._embedding_net, KNOWN)
    parts = [_part(part) for part in _flattened(flow._transform)]
    # theirs go from data to noise
    ours = Flow(Chain(reversed(parts)), Normal(tuple(base._shape)))
    like = next(flow.parameters(), torch.zeros(()))
    return finished(ours.to(like))


def _nflows() -> Any:
    try:
        import nflows.flows.base
    except ImportError as error:
        raise ImportError('this needs nflows: pip install "cnf[bench]"') from error
    return nflows


def _flattened(transform: Any) -> list[Any]:
    if type(transform).__name__ != "CompositeTransform":
        return [transform]
    return [part for inner in transform._transforms for part in _flattened(inner)]


def _part(part: Any) -> Transform:
    """One transform, whose inverse (data to noise) is their forward."""
    name = type(part).__name__
    if name in ("Permutation", "RandomPermutation", "ReversePermutation") and part._dim == 1:
        return Inverse(Permutation(part._permutation.cpu()))
    if name == "LULinear":
        return _lu(part)
    if name == "BatchNorm":
        return _batch_norm(part)
    if name == "MaskedAffineAutoregressiveTransform":
        # theirs is (scale, shift) for each feature
        return _autoregressive(part.autoregressive_net, Affine(scale="softplus"), [1, 0])
    if name == "MaskedPiecewiseRationalQuadraticAutoregressiveTransform":
        net = part.autoregressive_net
        return _autoregressive(net, _spline(part), list(range(_spline(part).size)))
    if name == "AffineCouplingTransform":
        default = getattr(type(part), "DEFAULT_SCALE_ACTIVATION", None)
        if getattr(part, "scale_activation", default) is not default:
            raise refuse(part, f"{KNOWN}; this one's scale_activation is not the default")
        return _coupling(part, Affine(scale="sigmoid"), [1, 1])
    if name == "AdditiveCouplingTransform":
        return _coupling(part, Additive(), [1])
    if name == "PiecewiseRationalQuadraticCouplingTransform":
        return _coupling(part, _spline(part), [_spline(part).size])
    raise refuse(part, KNOWN)


def _spline(part: Any) -> RationalQuadratic:
    if part.tails != "linear":
        raise refuse(part, f"{KNOWN}, with tails='linear'")
    return RationalQuadratic(
        bins=part.num_bins,
        bound=float(part.tail_bound),
        min_width=part.min_bin_width,
        min_height=part.min_bin_height,
        min_slope=part.min_derivative,
        form="nflows",
    )


def _scale(scalar_map: ScalarMap, net: Any, like: Tensor) -> Tensor:
    """What a feature's outputs are multiplied by: theirs divides widths and heights."""
    scale = torch.ones(scalar_map.size).to(like)
    if isinstance(scalar_map, RationalQuadratic) and hasattr(net, "hidden_features"):
        scale[: 2 * scalar_map.bins] = 1 / math.sqrt(net.hidden_features)
    return scale


def _autoregressive(net: Any, scalar_map: ScalarMap, order: list[int]) -> Autoregressive:
    """A MADE; ``order`` says where each of our parameters stands among a feature's outputs."""
    blocks = list(net.blocks)
    if hasattr(net, "context_layer"):
        raise refuse(net, f"{KNOWN}; this network has a context")
    linears = [net.initial_layer]
    for block in blocks:
        _plain(block)
        linears += list(block.linear_layers) if net.use_residual_blocks else [block.linear]
    linears.append(net.final_layer)
    like, width = net.final_layer.weight, net.initial_layer.out_features
    features = net.initial_layer.in_features
    made = MADE(
        features,
        scalar_map.size,
        hidden=[width] * (len(blocks) + (not net.use_residual_blocks)),
        activation=activation_name(net.activation),
        residual=net.use_residual_blocks,
    ).to(like)
    starts = torch.arange(features).unsqueeze(1) * scalar_map.size
    last = (starts + torch.tensor(order)).flatten()
    fill_made(made, linears, last, _scale(scalar_map, net, like).repeat(features))
    return Autoregressive(Inverted(scalar_map), made)


def _coupling(part: Any, scalar_map: ScalarMap, blocks: list[int]) -> Coupling:
    """A coupling; ``blocks`` are the sizes of what their network gives for all features at once."""
    net = part.transform_net
    if part.unconditional_transform is not None:
        raise refuse(part, f"{KNOWN}; this one transforms the other half too")
    if type(net).__name__ != "ResidualNet" or net.context_features is not None:
        raise refuse(net, f"{KNOWN}; couplings take a ResidualNet without context")
    linears = [net.initial_layer]
    for block in net.blocks:
        _plain(block)
        linears += list(block.linear_layers)
    linears.append(net.final_layer)
    mask = torch.zeros(part.features, dtype=torch.bool)
    mask[part.transform_features.cpu()] = True
    count = int(mask.sum())
    conditioner = MLP(
        part.features - count,
        count * scalar_map.size,
        hidden=[net.hidden_features] * len(net.blocks),
        activation=activation_name(net.blocks[0].activation) if len(net.blocks) else "relu",
        residual=True,
    ).to(net.final_layer.weight)
    scale = _scale(scalar_map, net, net.final_layer.weight).repeat(count)
    fill_mlp(conditioner, linears, interleaved(blocks, count), scale)
    return Coupling(Inverted(scalar_map), conditioner, mask)


def _plain(block: Any) -> None:
    """Refuse what a block may have besides linear layers."""
    if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
        raise refuse(block, f"{KNOWN}; this block has batch normalisation")


@torch.no_grad()
def _lu(part: Any) -> Inverse:
    lower, upper = part._create_lower_upper()
    ours = LULinear(part.features).to(lower)
    ours.lower.copy_(lower.tril(-1))
    ours.upper.copy_(upper.triu(1))
    ours.log_diagonal.copy_(upper.diagonal().log())
    ours.bias.copy_(part.bias)  # type: ignore[union-attr]
    return Inverse(ours)


@torch.no_grad()
def _batch_norm(part: Any) -> Inverse:
    scale = part.weight / torch.sqrt(part.running_var + part.eps)
    ours = Diagonal(len(scale)).to(scale)
    ours.log_scale.copy_(scale.log())
    ours.bias.copy_(part.bias - part.running_mean * scale)  # type: ignore[union-attr]
    return Inverse(ours)
