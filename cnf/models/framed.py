"""What every ready-made flow may stand in: a support for x, and a context that may be missing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from cnf.distributions import as_shape
from cnf.flow import Flow
from cnf.nets import OptionalContext
from cnf.transforms import as_support

KEYWORDS = """\
    support: where x lives: ``"positive"``, ``"interval"`` for (0, 1), the two ends
        ``(low, high)`` of another one, ``"simplex"``; None for all of space.
    optional_context: NaN may stand for a context that is not given, and so may none at all;
        training drops some, and ``cnf.guided`` exaggerates the others."""

OPTIONS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    for name, default, kind in (
        ("support", None, "str | tuple[float, float] | None"),
        ("optional_context", False, "bool"),
    )
]


def framed(builder: Callable[..., Flow]) -> Callable[..., Flow]:
    """Give a builder of flows the keywords ``support`` and ``optional_context``.

    The builder is asked for a flow of what lies behind the support, given one feature more that
    says whether the context is missing; it knows of neither.

    Args:
        builder: takes ``features`` first, and ``context_features``.

    Example:
        >>> import torch
        >>> import cnf
        >>> flow = cnf.maf(3, context_features=2, support="simplex", optional_context=True)
        >>> x = flow.sample((5,))  # of the density without a context
        >>> bool(torch.allclose(x.sum(-1), torch.ones(5)))
        True
    """
    own = inspect.signature(builder)
    # one family counts its layers instead
    lists_layers = "hidden" in own.parameters and isinstance(
        own.parameters["hidden"].default, tuple
    )

    @functools.wraps(builder)
    def build(
        features: int | Sequence[int],
        *,
        support: str | tuple[float, float] | None = None,
        optional_context: bool = False,
        **arguments: Any,
    ) -> Flow:
        if lists_layers and isinstance(arguments.get("hidden"), int):
            raise TypeError(
                f"hidden lists the sizes of the layers, as (64, 64) does, got {arguments['hidden']}"
            )
        data = as_shape(features)
        outer = as_support(support, data)
        shape = data if outer is None else outer.latent_shape(data)
        context_features = arguments.get("context_features", 0)
        if optional_context and not context_features:
            raise ValueError("a context that may be missing needs a size: pass context_features=…")
        if optional_context:
            arguments["context_features"] = context_features + 1
        flow = builder(shape[0] if len(shape) == 1 else shape, **arguments)
        if outer is not None and not flow.scales_data:
            raise ValueError(
                "integers have no support to be given, and neither have angles: drop support=, or "
                "dequantize="
            )
        if outer is None and not optional_context:
            return flow
        return Flow(
            flow.transform,
            flow.base,
            event_shape=data,
            context_features=context_features,
            standardize=flow.scales_data,
            support=outer,
            encoder=OptionalContext() if optional_context else None,
        )

    parameters = [*own.parameters.values(), *OPTIONS]
    build.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    head, args, rest = inspect.cleandoc(builder.__doc__ or "").partition("\nArgs:\n")
    listed, end, rest = rest.partition("\n\n")
    build.__doc__ = f"{head}{args}{listed}\n{KEYWORDS}{end}{rest}" if args else head
    return build
