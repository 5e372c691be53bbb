"""One model on one data set: parting the data, training, measuring, drawing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf import plots
from cnf.data import Table, Target, table, targets, toy
from cnf.flow import Flow
from cnf.models import models
from cnf.objectives import OBJECTIVES
from cnf.ode import Solver, count_nfe
from cnf.registry import unknown_name
from cnf.runs import Run, Source
from cnf.training import NUMERICAL, History, as_device, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 10_000
"""Points scored at once: enough to be fast, few enough for a small machine."""

DRAWN = 5_000
"""Points that a picture of samples shows."""

SUFFIXES: dict[str, tuple[str, ...]] = {
    "ml": ("likelihood",),
    "fm-only": ("flow-matching",),
    "fm": ("flow-matching", "likelihood"),
}
"""What may follow the ``+`` of a model's name: the objectives it is trained with, in turn."""

PATH_COSTS = ("rnode", "otflow")
"""Objectives that integrate costs along a continuous flow's path."""


class RecipeError(ValueError):
    """A model and a way to train it that do not go together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The data that every model of a comparison sees.

    Attributes:
        source: where the data came from.
        train: training points, ``(n, features)``.
        validation: what early stopping looks at.
        test: what is reported; no model has seen it.
        contexts: the contexts of the three, each ``(n, context_features)``, or three times None.
        truth: the true log-density of the test points in nats, or None.
        target: the toy, where the data come from one.
    """

    source: Source
    train: Tensor
    validation: Tensor
    test: Tensor
    contexts: tuple[Tensor | None, ...] = (None, None, None)
    truth: Tensor | None = None
    target: Target | None = None

    @property
    def shown(self) -> tuple[Tensor, Tensor | None]:
        """The points that a picture shows, test points first, and their context."""
        x = torch.cat([self.test, self.validation, self.train])[:DRAWN]
        contexts = [context for context in reversed(self.contexts) if context is not None]
        return x, torch.cat(contexts)[:DRAWN] if contexts else None

    @property
    def bounds(self) -> plots.Bounds:
        """Where a picture of the data ends: the toy's own limits, or the data's outer quantiles."""
        if self.target is not None:
            return self.target.bounds
        low, high = np.quantile(self.shown[0].numpy(), (0.002, 0.998), axis=0)
        room = 0.15 * (high - low)
        return tuple(zip((low - room).tolist(), (high + room).tolist(), strict=True))


def stream(seed: int, use: str) -> torch.Generator:
    """A generator of its own for each use of one seed.

    >>> a, b = stream(0, "train"), stream(0, "test")
    >>> bool(a.initial_seed() == b.initial_seed())
    False
    """
    words = np.random.SeedSequence([seed, *use.encode()]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def split(
    data: Target | Table,
    *,
    seed: int = 0,
    train_size: int = 100_000,
    test_size: int = 50_000,
    test: bool = True,
) -> Split:
    """Draw, or part, the data that models are trained and tested on.

    A toy gives ``train_size`` points, a tenth as many others for validation, and ``test_size``
    others again. A table is parted at random: a tenth each for validation and for the test;
    without a ``test`` the validation rows stand in for it.
    """
    if not isinstance(data, (Target, Table)):
        raise TypeError(
            f"expected a target or a table, got {type(data).__name__}; an array is for cnf.fit"
        )
    if isinstance(data, Target):
        others = data.sample(test_size, stream(seed, "test"))
        return Split(
            Source(data.name, ("x", "y"), seed=seed),
            data.sample(train_size, stream(seed, "train")),
            data.sample(max(train_size // 10, 1), stream(seed, "validation")),
            others,
            truth=data.log_prob(others.double()),
            target=data,
        )
    order = torch.randperm(len(data), generator=stream(seed, "split"))
    held = max(2, len(data) // 10)
    validation = order[held : 2 * held] if test else order[:held]
    parts = (order[2 * held :] if test else order[held:], validation, order[:held])
    given = data.context
    contexts = tuple(None if given is None else given[part] for part in parts)
    source = Source(
        str(data.path), data.columns, data.context_columns, seed, data.key, bool(data.dequantized)
    )
    train, held_out, last = (data.x[part] for part in parts)
    return Split(source, train, held_out, last, contexts)


def recipe(
    name: str, objectives: Sequence[str] | None = None
) -> tuple[str, tuple[str, ...] | None]:
    """A model's name and the objectives that train it, in turn; None leaves them to the model.

    >>> recipe("ffjord+ml")
    ('ffjord', ('likelihood',))

    Args:
        name: a model, and after a ``+`` one of ``SUFFIXES``.
        objectives: the objectives' own names, instead of a suffix.

    Raises:
        UnknownNameError: for a model, a suffix or an objective that nobody registered.
        RecipeError: for an objective that cannot train the model.
    """
    model, plus, suffix = name.partition("+")
    entry = models[model]
    if plus and suffix not in SUFFIXES:
        raise unknown_name("training suffix", suffix, SUFFIXES)
    chosen = tuple(objectives) if objectives else SUFFIXES[suffix] if plus else None
    for objective in chosen or ():
        if objective not in OBJECTIVES:
            raise unknown_name("objective", objective, OBJECTIVES)
        if objective == "flow-matching" and entry.family != "continuous":
            raise RecipeError(f"flow matching trains continuous flows; {model} has no velocity")
        if objective in PATH_COSTS and entry.family != "continuous":
            raise RecipeError(f"{objective} weighs a path, and {model} has no velocity")
        if objective == "otflow" and entry.objective != "otflow":
            raise RecipeError(f"otflow needs a potential, which {model} does not have")
    return entry.name, chosen


def train(
    name: str,
    data: Split,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    lr: float | None = None,
    objectives: Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    out: Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> tuple[Flow, History]:
    """Build the model of that name for the data, and fit it.

    Initial weights come from ``seed`` too; the global random state is left as it was.

    Args:
        name: a model, and after a ``+`` how to train it.
        data: what to train and validate on.
        seconds: training time; a minute if ``steps`` is not given either.
        steps: training steps.
        seed: decides initial weights and batches.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        dtype: what the flow computes in.
        batch_size: points per step; None leaves it to ``fit``.
        lr: the peak learning rate; None leaves it to ``fit``.
        objectives: names of objectives, in turn; None leaves them to the model.
        arguments: of the model, beside the sizes of data and context.
        out: a folder for checkpoints.
        resume: go on from the checkpoint there, if there is one.
        progress: whether to show a progress bar; None shows it in a terminal.

    Raises:
        RecipeError: if the model does not take these arguments.
    """
    model, objective = recipe(name, objectives)
    context, held_context, _ = data.contexts
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        try:
            flow = models[model].build(
                data.train.shape[-1],
                context_features=0 if context is None else context.shape[-1],
                **{**_recommended(name, data.train.shape[-1]), **(arguments or {})},
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{model}: {error}") from error
        flow.to(as_device(device), dtype)
        _rehearse(flow, data)
    chosen: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    history = fit(
        flow,
        data.train,
        context=context,
        objective=objective,
        validation=data.validation if held_context is None else (data.validation, held_context),
        steps=steps,
        seconds=60.0 if seconds is None and steps is None else seconds,
        seed=seed,
        progress=progress,
        lr=lr,
        out=out,
        resume=resume,
        **chosen,
    )
    return flow, history


def _recommended(name: str, features: int) -> dict[str, Any]:
    """Arguments that go with a way of training, unless they are given."""
    if name.partition("+")[2] != "fm":
        return {}
    # at training's tolerance the steps' gradient is exact enough, and cheaper than the adjoint's;
    # after flow matching paths bend, and in the plane, where a divergence is cheap, quadrature's
    # shorter steps cost training more than they save
    return {"solver": Solver(gradient="checkpoint", quadrature=False if features <= 2 else None)}


def _rehearse(flow: Flow, data: Split) -> None:
    """Score and differentiate a few rows with a copy of the flow.

    What torch loads and sets up at its first such call would else be taken from the training time
    of whichever model comes first.
    """
    copied = copy.deepcopy(flow)
    x, context = _rows(data.train, data.contexts[0], 64)
    x = x.to(flow.device, flow.dtype)
    context = None if context is None else context.to(flow.device, flow.dtype)
    # a flow that cannot be solved yet is for fit to report
    with contextlib.suppress(*NUMERICAL):
        copied.log_prob(x, context).sum().backward()


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one model; None where there is nothing to measure.

    Attributes:
        model: the name that was asked for.
        test_nll: mean negative log-density of the test points, nats.
        test_nll_stderr: its standard error.
        gap: mean of (true − model's) log-density on the same test points, nats.
        gap_stderr: standard error of the paired differences' mean.
        steps: optimiser steps taken.
        train_seconds: time spent in training.
        nfe: evaluations of the velocity in one scoring solve; None for discrete flows.
        log_prob_per_second: test points scored per second, exactly.
        samples_per_second: samples drawn per second.
        inverse_error: the largest |x − decode(encode(x))| seen.
        parameters: trainable numbers.
        error: why there is nothing to report; None for a model that finished.
    """

    model: str
    test_nll: float | None = None
    test_nll_stderr: float | None = None
    gap: float | None = None
    gap_stderr: float | None = None
    steps: int | None = None
    train_seconds: float | None = None
    nfe: float | None = None
    log_prob_per_second: float | None = None
    samples_per_second: float | None = None
    inverse_error: float | None = None
    parameters: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON holds it; ``error`` only where there was one."""
        values = dataclasses.asdict(self)
        if self.error is None:
            del values["error"]
        return values

    @property
    def note(self) -> str:
        """The one number that a picture shows."""
        return _note(self.test_nll, self.gap)

    def summary(self) -> str:
        """One line for people."""
        if self.error is not None:
            return f"{self.model}: failed: {self.error}"
        gap = "" if self.gap is None else f", gap {self.gap:.4f} ± {self.gap_stderr:.4f}"
        return (
            f"{self.model}: nll {self.test_nll:.4f} ± {self.test_nll_stderr:.4f} nats{gap}"
            f" after {self.steps:,d} steps in {self.train_seconds:.0f} s"
        )


def measure(name: str, flow: Flow, history: History, data: Split) -> Row:
    """Score a trained flow on the test points, exactly.

    Args:
        name: what to call the model.
        flow: the flow.
        history: how its training went.
        data: what to test on.

    Raises:
        FloatingPointError: if a test point's log-density is not finite.
    """
    x, context = _test(flow, data)
    scores, evaluations = [], []
    with torch.no_grad():
        flow.log_prob(*_rows(x, context, 100))  # the first call pays for what later ones reuse
        start = time.perf_counter()
        for i in range(0, len(x), CHUNK):
            with count_nfe() as nfe:
                part = flow.log_prob(*_rows(x[i:], None if context is None else context[i:], CHUNK))
            scores.append(part.double().cpu())
            evaluations.append(nfe.forward)
        scored = time.perf_counter() - start
        count = min(CHUNK, len(x))
        start = time.perf_counter()
        _sample(flow, context, count, stream(0, "timing")).cpu()
        drawn = time.perf_counter() - start
        few, of = _rows(x, context, 1000)
        back = flow.decode(flow.encode(few, of), of)
    log_prob = torch.cat(scores)
    bad = int((~log_prob.isfinite()).sum())
    if bad:
        raise FloatingPointError(f"{bad} of {len(x)} test points have no finite log-density")
    worst = float((few - back).abs().max())
    row = Row(
        name,
        test_nll=-float(log_prob.mean()),
        test_nll_stderr=_standard_error(log_prob),
        steps=history.steps,
        train_seconds=history.seconds,
        nfe=sum(evaluations) / len(evaluations) if any(evaluations) else None,
        log_prob_per_second=len(x) / scored,
        samples_per_second=count / drawn,
        inverse_error=worst if math.isfinite(worst) else None,
        parameters=sum(p.numel() for p in flow.parameters() if p.requires_grad),
    )
    if data.truth is None:
        return row
    # paired: the same points score the truth and the model, so their scatter cancels
    gap = data.truth - log_prob
    return dataclasses.replace(row, gap=float(gap.mean()), gap_stderr=_standard_error(gap))


def _note(nll: float | None, gap: float | None) -> str:
    if gap is not None:
        return f"gap {gap:.3f} nats"
    return "" if nll is None else f"nll {nll:.3f} nats"


def _test(flow: Flow, data: Split) -> tuple[Tensor, Tensor | None]:
    """The test points and their context, where and how the flow takes them."""
    context = data.contexts[2]
    return (
        data.test.to(flow.device, flow.dtype),
        None if context is None else context.to(flow.device, flow.dtype),
    )


def _rows(x: Tensor, context: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    return x[:count], None if context is None else context[:count]


def _sample(flow: Flow, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """So many samples: at the first contexts, one each, where there are any."""
    if generator.device != flow.device:
        generator = torch.Generator(flow.device).manual_seed(generator.initial_seed())
    if context is None:
        return flow.sample((count,), generator=generator, chunk=CHUNK)
    return flow.sample((), context[:count], generator=generator, chunk=CHUNK)


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def data_panel(data: Split) -> plots.Panel:
    """The column of a picture that shows the data, with its density or a histogram of it."""
    density = None
    if data.target is not None:
        density = plots.evaluate(data.target.log_prob, data.bounds)
    elif data.test.shape[-1] == 2 and data.contexts[2] is None:
        x, y = torch.cat([data.train, data.validation, data.test]).numpy().T
        cells = min(max(round(len(x) ** 0.4), 10), 80)
        counts, *_ = np.histogram2d(x, y, cells, data.bounds, density=True)
        density = torch.from_numpy(counts.T.copy())
    return plots.Panel("data", data.shown[0], density, Path(data.source.name).name)


def model_panel(
    name: str, flow: Flow, data: Split, *, seed: int = 0, note: str = ""
) -> plots.Panel:
    """The column of a picture that shows a model."""
    x, context = data.shown
    if context is not None:
        context = context.to(flow.device, flow.dtype)
    samples = _sample(flow, context, len(x), stream(seed, "picture"))
    density = None
    if context is None and data.test.shape[-1] <= 2:
        density = plots.evaluate(flow.log_prob, data.bounds, like=samples)
    return plots.Panel(name, samples.cpu(), density, note)


def held_out(name: str, history: History) -> plots.Curve:
    """A model's held-out nats over its training time."""
    return plots.Curve(name, [(seconds, nats) for _, seconds, nats in history.validations])


def draw_run(run: Run, *, name: str, seed: int = 0) -> Figure:
    """The picture of one run beside the data that it was fitted to.

    Raises:
        DataError: if the data are no longer where they were.
    """
    source = run.source
    found: Target | Table
    if source.name in targets():
        found = toy(source.name)
    else:
        found = table(
            source.name,
            columns=source.columns,
            context_columns=source.context_columns,
            key=source.key,
            drop_missing=True,
            fitting=False,
            minimum_rows=20,
        )
    data = split(found, seed=source.seed, train_size=DRAWN, test_size=DRAWN)
    note = _note(run.results.get("test_nll"), run.results.get("gap"))
    return plots.comparison(
        [data_panel(data), model_panel(name, run.flow, data, seed=seed, note=note)],
        [held_out(name, run.history)],
        bounds=data.bounds,
        columns=() if data.target is not None else source.columns,
        truth=None if data.target is None else data.target.entropy,
        title=Path(source.name).name,
    )
