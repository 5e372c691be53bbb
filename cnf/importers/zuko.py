"""From zuko."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from cnf.bijections import Affine, Inverted, RationalQuadratic, ScalarMap
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.importers.weights import (
    activation_name,
    dependencies,
    fill_made,
    finished,
    refuse,
)
from cnf.nets import MADE
from cnf.transforms import Autoregressive, Chain, Transform

KNOWN = (
    "known are MAF and NSF (fully autoregressive or with passes, with or without context, "
    "MaskedMLP without residual blocks) over a normal base"
)


def from_zuko(flow: Any) -> Flow:
    """A ``zuko.flows.MAF`` or ``NSF`` as a flow of this package, with the same log-density.

    The weights are copied. The result was put together by hand, so it saves its state only: import
    again and use ``cnf.load(dir, into=…)``.

    Args:
        flow: the other one, over two features or more; its dtype and device are kept.

    Raises:
        ImportedFlowError: if a part of it is not known here; the message names the part.

    Example:
        >>> import torch
        >>> import zuko  # doctest: +SKIP
        >>> theirs = zuko.flows.NSF(3, transforms=2)  # doctest: +SKIP
        >>> x = torch.randn(5, 3)
        >>> from_zuko(theirs).log_prob(x) - theirs().log_prob(x)  # doctest: +SKIP
        tensor([0., 0., 0., 0., 0.])
    """
    zuko = _zuko()
    if not isinstance(flow, zuko.lazy.Flow):
        raise refuse(flow, KNOWN)
    transforms = getattr(flow.transform, "transforms", [flow.transform])
    layers: list[Transform] = []
    for part in transforms:
        if not isinstance(part, zuko.flows.autoregressive.MaskedAutoregressiveTransform):
            raise refuse(part, KNOWN)
        layers.append(_autoregressive(part))
    base = _normal(flow.base)
    first = transforms[0].hyper[0].weight
    context = first.shape[1] - base.event_shape[0]
    # theirs go from data to noise
    ours = Flow(Chain(reversed(layers)), base, context_features=context)
    return finished(ours.to(first))


def _zuko() -> Any:
    try:
        import zuko.flows.autoregressive
        import zuko.lazy
    except ImportError as error:
        raise ImportError('this needs zuko: pip install "cnf[bench]"') from error
    return zuko


def _autoregressive(part: Any) -> Autoregressive:
    scalar_map = _scalar_map(part.univariate, part.shapes)
    layers = list(part.hyper)
    linears, activations = layers[0::2], layers[1::2]
    if not all(hasattr(layer, "mask") for layer in linears):
        raise refuse(next(layer for layer in layers if not hasattr(layer, "mask")), KNOWN)
    outputs, inputs = linears[-1].weight.shape[0], linears[0].weight.shape[1]
    features = outputs // scalar_map.size
    made = MADE(
        features,
        scalar_map.size,
        hidden=[layer.weight.shape[0] for layer in linears[:-1]],
        context_features=inputs - features,
        activation=activation_name(activations[0]) if activations else "relu",
        adjacency=dependencies([layer.mask for layer in linears], features)[:: scalar_map.size],
    ).to(linears[0].weight)
    places = torch.arange(outputs)
    fill_made(made, linears, places, torch.ones(outputs).to(linears[0].weight))
    return Autoregressive(Inverted(scalar_map), made)


def _scalar_map(univariate: Any, shapes: Any) -> ScalarMap:
    keywords: dict[str, Any] = {}
    if isinstance(univariate, functools.partial):
        univariate, keywords = univariate.func, dict(univariate.keywords)
    slope = keywords.pop("slope", 1e-3)
    name = getattr(univariate, "__name__", repr(univariate))
    if name == "MonotonicAffineTransform" and not keywords:
        return Affine(bound=-math.log(slope), scale="softclip")
    if name == "MonotonicRQSTransform" and keywords.keys() <= {"bound"}:
        bins = shapes[0][0]
        bound = float(keywords.get("bound", 5.0))
        return RationalQuadratic(bins=bins, bound=bound, min_slope=slope, form="zuko")
    raise refuse(univariate, f"{KNOWN}; this one's univariate map is {name}")


def _normal(base: Any) -> Normal:
    distribution = base(None)
    inner = getattr(distribution, "base", getattr(distribution, "base_dist", None))
    if not isinstance(inner, torch.distributions.Normal):
        raise refuse(distribution, KNOWN)
    ours = Normal(inner.loc.shape).to(inner.loc)
    with torch.no_grad():
        ours.loc.copy_(inner.loc)
        ours.log_scale.copy_(inner.scale.log())
    return ours
