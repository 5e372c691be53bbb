"""A flow as ``torch.distributions`` knows distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cnf.transforms.support import SupportedStandardize

if TYPE_CHECKING:
    from cnf.flow import Flow


class FlowDistribution(torch.distributions.Distribution):
    """A flow at a fixed context, for everything that takes a ``torch`` distribution."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, flow: Flow, context: Tensor | None = None, batch_shape: Sequence[int] = ()):
        self.flow, self.context = flow, context
        batch = torch.Size(batch_shape) if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(flow.event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """All of real space, or what the flow's support says."""
        if isinstance(self.flow.scaling, SupportedStandardize):
            return self.flow.scaling.constraint
        constraints = torch.distributions.constraints
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        return self.flow.log_prob(value, self.context)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Reparameterised samples."""
        return self.flow.rsample(self._shape(sample_shape), self.context)

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Samples without gradient."""
        return self.flow.sample(self._shape(sample_shape), self.context)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same flow over more batch axes."""
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, self.flow.context_features)
        return FlowDistribution(self.flow, context, batch_shape)

    def _shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        # a context brings the batch axes itself
        return (*sample_shape, *(self.batch_shape if self.context is None else ()))
