"""Contexts that may be missing, and the exaggeration of what a context changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnf.nets.fields import Field


class OptionalContext(nn.Module):
    """An encoder that lets NaN stand for a context that is not given.

    Returns the context and one more feature, 1 where any entry is missing (all of the row is then
    0) and else 0: ``(*batch, features)`` to ``(*batch, features + 1)``.

    Example:
        >>> OptionalContext()(torch.tensor([[2.0], [torch.nan]]))
        tensor([[2., 0.],
                [0., 1.]])
    """

    def forward(self, context: Tensor) -> Tensor:
        """Fill and flag what is missing."""
        missing = context.isnan().any(-1, keepdim=True)
        filled = torch.where(missing, 0.0, context)
        return torch.cat([filled, missing.to(context.dtype)], -1)


@torch.no_grad()
def takes_missing(encoder: nn.Module, missing: Tensor) -> bool:
    """Whether an encoder makes finite numbers of a context of NaN, ``(features,)``.

    >>> takes_missing(OptionalContext(), torch.tensor([torch.nan]))
    True
    """
    # as a batch and as in eval(), so that encoders of any kind can be asked and none learns of it
    training = [module for module in encoder.modules() if module.training]
    try:
        return bool(encoder.eval()(missing.unsqueeze(0)).isfinite().all())
    except (IndexError, RuntimeError, ValueError):
        return False  # an embedding, for one, has no place for NaN
    finally:
        for module in training:
            module.training = True


class Guided(Field):
    """v(t, x, ∅) + weight · (v(t, x, context) − v(t, x, ∅)), classifier-free guidance.

    Args:
        field: a velocity field.
        missing: the context that stands for none, ``(context_features,)``.
        weight: 0 ignores the context, 1 is the field itself, more exaggerates.

    Paper: Ho & Salimans, "Classifier-free diffusion guidance", 2022; for velocities, Zheng et al.,
    "Guided flows for generative modeling and decision making", 2023.

    Example:
        >>> from cnf.nets import TimeMLP
        >>> field = TimeMLP(2, (8,), context_features=1)
        >>> guided = Guided(field, torch.zeros(1), weight=1.0)
        >>> t, x, context = torch.tensor(0.5), torch.randn(5, 2), torch.randn(5, 1)
        >>> torch.allclose(guided(t, x, context), field(t, x, context), atol=1e-6)
        True
    """

    def __init__(self, field: nn.Module, missing: Tensor, weight: float):
        super().__init__()
        self.field, self.weight = field, weight
        self.event_dims = getattr(field, "event_dims", 1)
        self.couples_batch = getattr(field, "couples_batch", True)
        self.register_buffer("missing", missing.detach().clone())

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The guided velocity at ``x``, where the context is given."""
        missing: Tensor = self.get_buffer("missing")
        if context is None:
            raise ValueError("a guided field needs the context that it is guided to")
        without = self.field(t, x, missing.expand(context.shape))
        return torch.lerp(without, self.field(t, x, context), self.weight)

    def extra_repr(self) -> str:
        """How strongly it is guided."""
        return f"weight={self.weight}"
