"""A flow: a transform and a base, with the density and the sampler that they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cnf.compiling import compiled, in_columns
from cnf.distributions import Base, as_shape
from cnf.distributions.base import sample_sizes
from cnf.nets.guidance import takes_missing
from cnf.registry import Recipe
from cnf.storage import save
from cnf.torch_distribution import FlowDistribution
from cnf.transforms.base import (
    Mapped,
    Request,
    Transform,
    check_path_times,
    compose,
    of_kind,
    value_only,
)
from cnf.transforms.continuous import Continuous
from cnf.transforms.normalization import Standardize
from cnf.transforms.support import SupportedStandardize

VALUE_ONLY = Request(log_det=False)
# Steps of an autoregressive transform up to which compiling them pays. 512 samples of five layers
# took 0.57 of the time with 2 steps, 0.7 with 4, 0.8 with 8 and 1.1 with 16, if they were affine,
# after 20, 20, 40 and 70 seconds of compiling; splines 0.2 with 2, 4 and 8, after 35, 40 and 75.
UNROLLED = 8


class Evaluation(NamedTuple):
    """Everything one pass from data to base says about points.

    Attributes:
        log_prob: in nats and in the data's own units, ``(*batch,)``.
        stderr: its standard error where the request asked for the variance, else None.
        z: the latent points.
        costs: the path costs that the request asked for, each ``(*batch,)``.
    """

    log_prob: Tensor
    stderr: Tensor | None
    z: Tensor
    costs: dict[str, Tensor]


class Flow(nn.Module):
    """A density by change of variables: log p(x) = log p(z) + log |det dz/dx|.

    x and the context are standardised by a fixed affine map that ``standardize`` fills from data;
    densities are in the data's own units all the same. Shapes follow ``torch.distributions``:
    samples are ``sample_shape + batch_shape + event_shape``, the batch shape being the context's.

    Args:
        transform: the map between z and (standardised) x.
        base: the distribution of z.
        event_shape: the shape of one x; the base's unless the transform reshapes.
        context_features: size of the context, 0 for an unconditional density.
        standardize: False leaves x as it is whatever data comes, for a transform whose data's side
            has units of its own: dequantisation wants integers. The context is scaled all the same.
        support: a fixed map from all of space onto the part where x lives, ``Interval`` or
            ``Simplex``; x is standardised behind it, and has log-density -inf outside.
        encoder: a network from the (standardised) context ``(*batch, context_features)`` to what
            transform and base are conditioned on instead; it is trained along and saved with them.

    Example:
        >>> import torch
        >>> import cnf
        >>> flow = cnf.realnvp(2)
        >>> flow.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
        >>> flow.sample((3,)).shape
        torch.Size([3, 2])
    """

    recipe: Recipe | None = None
    initialized: Tensor

    def __init__(
        self,
        transform: Transform,
        base: Base,
        *,
        event_shape: int | Sequence[int] | None = None,
        context_features: int = 0,
        standardize: bool = True,
        support: Transform | None = None,
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        of_kind("transform", transform, Transform)
        of_kind("base", base, Base, "cnf.distributions.Wrapped makes one of a torch distribution")
        self.event_shape = as_shape(base.event_shape if event_shape is None else event_shape)
        self.context_features = context_features
        self.scaling: Standardize
        if support is None:
            self.scaling = Standardize(self.event_shape)
        else:
            self.scaling = SupportedStandardize(support, self.event_shape)
        latent = transform.latent_shape(self.scaling.event_shape)
        if latent != base.event_shape:
            raise ValueError(
                f"the transform takes x of shape {self.scaling.event_shape} to z of shape "
                f"{latent}, and the base has {base.event_shape}"
            )
        self.transform = transform
        self.base = base
        self.scales_data = standardize
        self.register_buffer("initialized", torch.tensor(False))
        self.context_scaling = Standardize((context_features,)) if context_features else None
        if encoder is not None and not context_features:
            raise ValueError("an encoder needs a context to encode: pass context_features=")
        self.encoder = encoder
        self._compiled: dict[str, Callable[..., Mapped]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that the flow computes in."""
        return self.scaling.loc.dtype

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return self.scaling.loc.device

    @property
    def optional_context(self) -> bool:
        """Whether NaN, or no context at all, may stand for a context that is not given."""
        return self.encoder is not None and takes_missing(self.encoder, self._no_context())

    # ---- densities -------------------------------------------------------------------------

    def forward(self, x: Any, context: Any = None) -> Tensor:
        """The same as ``log_prob``."""
        return self.log_prob(x, context)

    def log_prob(self, x: Any, context: Any = None, *, chunk: int | None = None) -> Tensor:
        """Log-density in nats, exact and repeatable wherever the transform's own is.

        Args:
            x: ``(*batch, *event_shape)``, a tensor or an array.
            context: ``(*batch, context_features)``, broadcast against x's batch.
            chunk: evaluate at most this many points at a time.

        Returns:
            ``(*batch,)``.
        """
        return self.evaluate(x, context, chunk=chunk).log_prob

    def evaluate(
        self,
        x: Any,
        context: Any = None,
        request: Request | None = None,
        *,
        chunk: int | None = None,
    ) -> Evaluation:
        """Log-density with its standard error, latent points and path costs, as requested."""
        x, context = self._broadcast(x, context)

        def score(x: Tensor, context: Tensor | None) -> dict[str, Tensor]:
            z, log_prob, costs = self._score(x, self._seen(context), request)
            return {"log_prob": log_prob, "z": z, **{f"cost {k}": v for k, v in costs.items()}}

        parts = self._in_chunks(score, x, context, chunk)
        costs = {k.removeprefix("cost "): v for k, v in parts.items() if k.startswith("cost ")}
        variance = costs.pop("log_det_variance", None)
        if variance is None and request is not None and request.variance:
            variance = torch.zeros_like(parts["log_prob"])
        stderr = None if variance is None else variance.sqrt()
        return Evaluation(parts["log_prob"], stderr, parts["z"], costs)

    def encode(self, x: Any, context: Any = None) -> Tensor:
        """The latent z of data x."""
        x, context = self._broadcast(x, context)
        return self._inverse(x, self._seen(context), VALUE_ONLY).value

    def decode(self, z: Any, context: Any = None) -> Tensor:
        """The data x of latent z."""
        z, context = self._broadcast(z, context, self.base.event_shape)
        return self._forward(z, self._seen(context), VALUE_ONLY).value

    # ---- samples ---------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int] = (),
        context: Any = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Draw samples, without gradient.

        Args:
            shape: how many, as a shape.
            context: ``(*batch_shape, context_features)``; each is sampled ``shape`` times.
            temperature: multiplies the base's spread.
            generator: where the randomness comes from.
            chunk: map at most this many points at a time.

        Returns:
            ``(*shape, *batch_shape, *event_shape)``.
        """
        z, seen = self._draw(shape, context, temperature, generator)

        def generate(z: Tensor, seen: Tensor | None) -> dict[str, Tensor]:
            return {"x": self._forward(z, seen, VALUE_ONLY).value}

        return self._in_chunks(generate, z, seen, chunk, self.base.event_shape)["x"]

    def rsample(
        self,
        shape: Sequence[int] = (),
        context: Any = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples that carry gradients to the parameters and the context."""
        z, seen = self._draw(shape, context, temperature, generator)
        return self._forward(z, seen, VALUE_ONLY).value

    def sample_and_log_prob(
        self,
        shape: Sequence[int] = (),
        context: Any = None,
        *,
        temperature: float = 1.0,
        request: Request | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw reparameterised samples with their log-density, in one pass.

        The density is the flow's own, whatever the temperature. Noise comes from the request's
        generator.
        """
        generator = None if request is None else request.generator
        z, seen = self._draw(shape, context, temperature, generator)
        x, log_det, _ = self._forward(z, seen, request)
        return x, self.base.log_prob(z, seen) - log_det

    def trajectory(self, z: Any, times: Any, context: Any = None) -> tuple[Tensor, Tensor]:
        """The path from latent z (t = 0) to data (t = 1), in the data's own units.

        Args:
            z: ``(*batch, *event)``.
            times: increasing times in [0, 1]; a discrete flow answers with its layers' instead.
            context: ``(*batch, context_features)``.

        Returns:
            The times, and the values there, ``(times, *batch, *event)``.
        """
        z, context = self._broadcast(z, context, self.base.event_shape)
        times = self._tensor("times", times)
        check_path_times(times)
        times, values = self.transform.trajectory(z, times, self._seen(context))
        return times, self.scaling.forward(values).value

    def distribution(self, context: Any = None) -> FlowDistribution:
        """The flow at a context as a ``torch.distributions.Distribution``."""
        return FlowDistribution(self, self._context(context))

    # ---- data-dependent state --------------------------------------------------------------

    @torch.no_grad()
    def standardize(self, x: Any, context: Any = None) -> Flow:
        """Fill the fixed affine maps from data: x and context then have mean 0 and variance 1.

        A flow that was built with ``standardize=False`` scales the context alone. An optional
        context is scaled by the rows that have it.
        """
        x, context = self._broadcast(x, context)
        if self.scales_data:
            self.scaling.fit(x)
        if self.context_scaling is not None and context is not None:
            if self.optional_context:
                context = context[~context.isnan().any(-1)]
            self.context_scaling.fit(context)
        return self

    @torch.no_grad()
    def initialize(self, x: Any, context: Any = None, request: Request | None = None) -> Flow:
        """Let transform and base set their data-dependent parameters (ActNorm's) from a batch.

        A transform that draws noise draws it from the request's generator.
        """
        x, context = self._broadcast(x, context)
        x, seen = self.scaling.inverse(x).value, self._seen(context)
        self.transform.initialize(x, seen, request)
        z = self.transform.inverse(x, seen, value_only(request)).value
        self.base.initialize(z, seen, request)
        self.initialized.fill_(True)
        return self

    # ---- the two directions ----------------------------------------------------------------

    def _score(self, x: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        return _in_rows(self._compiled.get("score", self._run_score)(x, seen, request))

    def _inverse(self, x: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        return _in_rows(self._compiled.get("inverse", self._run_inverse)(x, seen, request))

    def _forward(self, z: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        return _in_rows(self._compiled.get("forward", self._run_forward)(z, seen, request))

    def _run_score(self, x: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        """The inverse, with the log-density in place of the log-determinant."""
        z, log_det, costs = self._run_inverse(x, seen, request)
        return Mapped(z, self.base.log_prob(z, seen) + log_det, costs)

    def _run_inverse(self, x: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        x = in_columns(x)
        return compose(x, (self.scaling.inverse, self.transform.inverse), seen, request)

    def _run_forward(self, z: Tensor, seen: Tensor | None, request: Request | None) -> Mapped:
        z = in_columns(z)
        return compose(z, (self.transform.forward, self.scaling.forward), seen, request)

    def _seen(self, context: Tensor | None) -> Tensor | None:
        """What transform and base are conditioned on: the context scaled, then encoded."""
        if context is None or self.context_scaling is None:
            return context
        context = self.context_scaling.inverse(context).value
        return context if self.encoder is None else self.encoder(context)

    def _draw(
        self,
        shape: Sequence[int],
        context: Any,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        shape = sample_sizes(shape)
        seen = self._seen(self._context(context))
        batch = shape + (() if seen is None else seen.shape[:-1])
        if seen is not None:
            seen = seen.expand(*batch, seen.shape[-1])
        return self.base.rsample(batch, seen, temperature, generator), seen

    def _in_chunks(
        self,
        function: Callable[[Tensor, Tensor | None], dict[str, Tensor]],
        value: Tensor,
        context: Tensor | None,
        chunk: int | None,
        event_shape: tuple[int, ...] | None = None,
    ) -> dict[str, Tensor]:
        """Apply a function to all points at once, or to ``chunk`` of them at a time."""
        event_shape = event_shape or self.event_shape
        batch = value.shape[: value.dim() - len(event_shape)]
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be a positive number of points, got {chunk}")
        if chunk is None or math.prod(batch) <= chunk:
            return function(value, context)
        values = value.reshape(-1, *event_shape).split(chunk)
        contexts: Sequence[Tensor | None] = [None] * len(values)
        if context is not None:
            contexts = context.reshape(-1, context.shape[-1]).split(chunk)
        parts = [function(*pair) for pair in zip(values, contexts, strict=True)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: part.reshape(*batch, *part.shape[1:]) for name, part in joined.items()}

    # ---- what the user gives ---------------------------------------------------------------

    def _broadcast(
        self, value: Any, context: Any, event_shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        event_shape = event_shape or self.event_shape
        value, context = self._tensor("x", value), self._context(context)
        dims = len(event_shape)
        if value.dim() < dims or tuple(value.shape[value.dim() - dims :]) != event_shape:
            raise ValueError(
                f"expected points of shape (*batch, {', '.join(map(str, event_shape))}), got "
                f"{tuple(value.shape)}"
            )
        if context is None:
            return value, None
        batch = value.shape[: value.dim() - dims]
        try:
            both = torch.broadcast_shapes(batch, context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"the context's batch axes {tuple(context.shape[:-1])} do not broadcast against "
                f"the points' {tuple(batch)}"
            ) from None
        return value.expand(*both, *event_shape), context.expand(*both, self.context_features)

    def _context(self, context: Any) -> Tensor | None:
        if context is None:
            if self.context_features and not self.optional_context:
                raise ValueError(
                    f"this flow is conditional: it needs a context of shape (*batch, "
                    f"{self.context_features})"
                )
            return self._no_context() if self.optional_context else None
        context = self._tensor("context", context)
        if not self.context_features:
            raise ValueError("this flow takes no context; build it with context_features=…")
        if context.dim() < 1 or context.shape[-1] != self.context_features:
            raise ValueError(
                f"expected a context of shape (*batch, {self.context_features}), got "
                f"{tuple(context.shape)}"
            )
        return context

    def _no_context(self) -> Tensor:
        return self.scaling.loc.new_full((self.context_features,), math.nan)

    def _tensor(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.as_tensor(np.array(value), device=self.device).to(self.dtype)
        if value.device != self.device:
            raise ValueError(
                f"{name} is on {value.device} and the flow on {self.device}; move one with .to()"
            )
        if value.dtype != self.dtype:
            raise TypeError(
                f"{name} is {value.dtype} and the flow {self.dtype}; convert one of them, e.g. "
                f"{name}.to(flow.dtype) or flow.to({value.dtype})"
            )
        return value

    # ---- files and compilers ---------------------------------------------------------------

    def save(self, directory: str | Path, *, recipe: bool = True) -> None:
        """Write ``flow.json`` and ``flow.safetensors`` into a directory, for ``cnf.load``.

        Args:
            directory: is made if need be.
            recipe: False writes the numbers alone, for ``cnf.load(dir, into=flow)``: the way for a
                flow that was put together by hand.

        Raises:
            TypeError: if the flow cannot be built again from data; the message says the way out.
        """
        save(self, directory, recipe=recipe)

    def compile(  # type: ignore[override]
        self, *, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None
    ) -> Flow:
        """Compile scoring and sampling in place; the first call of each pays for it.

        The solver's loop stays what it is: continuous blocks compile their steps, as
        ``Solver(compile=mode or backend)`` does, where their solver can. On a CPU, a direction in
        which an autoregressive transform finds more than a few features one after the other stays
        uncompiled, too. Call this where the flow is to stay: code is made for its device, and for
        each kind of call: with gradients or without, other batch axes, a batch of one. It has
        first derivatives only, and knows the hooks that there were when it was made.

        Args:
            backend: as in ``torch.compile``.
            mode: as in ``torch.compile``; ``"reduce-overhead"`` takes CUDA graphs.
            dynamic: as in ``torch.compile``, for what is not continuous.
        """
        for block in self.modules():
            if isinstance(block, Continuous) and block.solver.compiles:
                block.solver = dataclasses.replace(block.solver, compile=mode or backend)
        forward, inverse = self.transform.steps
        runs = {
            "score": (self._run_score, inverse),
            "inverse": (self._run_inverse, inverse),
            "forward": (self._run_forward, forward),
        }
        # on a CPU a tenth of the time is Python's that starts the kernels
        native = mode is None and self.device.type == "cpu"
        self._compiled = {
            name: compiled(run, backend=backend, mode=mode, dynamic=dynamic, native=native)
            for name, (run, steps) in runs.items()
            if steps <= UNROLLED or self.device.type != "cpu"
        }
        return self

    def __getstate__(self) -> dict[str, Any]:
        # compiled code belongs to this process
        return {**self.__dict__, "_compiled": {}}


def _in_rows(mapped: Mapped) -> Mapped:
    """The same with each point's numbers side by side: layers pass them on as they come."""
    return mapped._replace(value=mapped.value.contiguous())
