"""``fit``: prepare the data, run the objectives in turn, keep the best weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnf.objectives import Objective, build_objective
from cnf.registry import MODELS
from cnf.training import budget, checkpoint
from cnf.training.data import Order, Rows, Shape, training_and_validation
from cnf.training.history import History
from cnf.training.progress import Bar
from cnf.training.run import Run, Settings, TrainingError
from cnf.training.validation import Validator
from cnf.transforms.base import Request

if TYPE_CHECKING:
    from cnf.flow import Flow

__all__ = ["TrainingError", "fit"]

STANDARDIZE_ROWS = 100_000  # rows that mean and standard deviation are taken from


def fit(
    flow: Flow,
    data: Any,
    *,
    objective: str | Objective | Sequence[str | Objective] | None = None,
    shares: Sequence[float] | None = None,
    context: Any = None,
    weights: Any = None,
    validation: Any = None,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 512,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.02,
    schedule: str = "cosine",
    clip: float | None = 5.0,
    average: float = 0.999,
    patience: int | None = None,
    validate_every: int | None = None,
    on_failure: str = "skip",
    initialize: bool | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> History:
    """Train a flow on data, in place; it ends with the best weights that validation has seen.

    A tenth of the rows (at most 10,000) is set aside for validation unless it is given. Standard
    scores are taken from the training rows, then the learning rate rises and falls as a cosine. The
    weights are averaged as it goes, and it is the averages that are validated and kept. With steps
    and seconds both given, whichever ends first ends the run; with neither, 3,000 steps are made.
    Ctrl-C ends it early with all else as at the end, and ``stopped`` says so. The flow is left in
    eval mode, to be scored as it was validated.

    Args:
        flow: the flow.
        data: a target, a tensor or array ``(rows, *event)``, a table, a map-style ``Dataset``, or
            ``(x, context)``. From a target 100,000 rows are drawn. It is converted to the flow's
            dtype and device.
        objective: what to minimise: an objective of this flow, a name, or several that run in
            turn. None means what the flow's paper trains with, or else the likelihood.
        shares: how several objectives divide the budget; None takes each objective's own share:
            flow matching has three quarters, or 5,000 steps if those are less, before the
            likelihood.
        context: the context of the data, ``(rows, context_features)``.
        weights: how much each row of the data counts, ``(rows,)``, not negative; only their ratios
            matter. A row of weight 2 is one that is there twice, a row of weight 0 is not there.
            A ``Batch`` may bring them.
        validation: rows to validate on, in any of the forms of ``data``.
        steps: how many optimiser steps to make.
        seconds: how much wall time to train for, validation included.
        batch_size: rows per step.
        optimizer: ``"adamw"``, or ``"muon"``, which levels the steps of wide layers' matrices and
            leaves the rest to AdamW, see ``cnf.training.muon``. None takes the first objective's
            own: Muon begins with flow matching, AdamW with the likelihood.
        lr: the peak learning rate; None takes each objective's own.
        weight_decay: decoupled, on matrices.
        warmup: the fraction of an objective's budget over which the learning rate rises; after
            another objective, it rises over twenty steps at least.
        schedule: ``"cosine"`` or ``"constant"``, after the warm-up.
        clip: the largest gradient norm, None for any.
        average: decay of the moving average of the weights, 0 for none. Its horizon is never
            longer than a tenth of the run so far.
        patience: stop an objective after so many validations without improvement.
        validate_every: steps between validations; by default some forty validations, and less
            where they would take more than a tenth of the time.
        on_failure: ``"skip"`` leaves out steps whose loss or gradient is not finite or whose solve
            fails, until too many do; ``"stop"`` ends the run at the first.
        initialize: whether to fill the flow's standardisation and data-dependent parameters from
            the training rows; None does so unless it has been done before.
        seed: all randomness follows from it: split, batches, noise.
        device: ``"cpu"``, ``"cuda"``, ``"auto"``, or None to train where the flow is.
        out: a folder for the latest checkpoint.
        resume: continue from the checkpoint in ``out``, if there is one.
        progress: whether to show a progress bar; None shows it in a terminal.

    Returns:
        What happened.

    Raises:
        TrainingError: if too many steps fail. The flow then has the best weights so far.
        DataError: if rows lie where the flow can have no density, such as outside of its support.
        CheckpointError: if ``resume`` finds the checkpoint of another flow or another fit.

    Example:
        >>> import cnf
        >>> flow = cnf.realnvp(2)
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> history = cnf.fit(flow, x, steps=20)
        >>> history.steps, history.stopped
        (20, 'steps')
    """
    if steps is None and seconds is None:
        steps = budget.DEFAULT_STEPS
    if resume and out is None:
        raise ValueError("resume=True needs the folder of the earlier fit: pass out=…")
    if device is not None:
        flow.to(as_device(device))
    objectives = _objectives(objective, flow)
    shares = [one.share for _, one in objectives] if shares is None else list(shares)
    if len(shares) != len(objectives):
        raise ValueError(f"shares must have one entry per objective: {len(objectives)}")
    budget.check(steps, seconds, shares)
    # the first objective's goes on in those that follow: it suits the weights that it has made
    optimizer = optimizer or objectives[0][1].optimizer
    settings = Settings(
        shares=tuple(shares),
        steps=steps,
        seconds=seconds,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        clip=clip,
        average=average,
        patience=patience,
        validate_every=validate_every,
        on_failure=on_failure,
    )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    root = torch.Generator().manual_seed(seed)
    order_seed, noise_seed = torch.randint(2**62, (2,), generator=root).tolist()
    like = torch.empty(0, dtype=flow.dtype, device=flow.device)
    shape = Shape(flow.event_shape, flow.context_features, like, flow.optional_context)
    rows, held = training_and_validation(data, context, validation, shape, root, weights)
    order = Order(len(rows), batch_size, torch.Generator().manual_seed(order_seed))
    noise = torch.Generator(device=flow.device).manual_seed(noise_seed)

    identity = {
        "flow": checkpoint.signature(flow.state_dict().items()),
        "structure of the flow": checkpoint.structure(flow),
        "seed": seed,
        "number of training rows": len(rows),
        "weighting of rows": rows.weight is not None,
        "batch size": order.size,
        "sequence of objectives": [name for name, _ in objectives],
        "optimizer": optimizer,
    }
    _check(flow, held.x, "validation samples")
    folder = None if out is None else Path(out)
    saved = checkpoint.read(folder) if resume and folder is not None else None
    if saved is None and (initialize or (initialize is None and not bool(flow.initialized))):
        _initialize(flow, rows, order.size, noise, standardize=bool(initialize) or _unscaled(flow))
    bar = Bar(progress)
    validator = Validator(held)
    run = Run(flow, objectives, rows, validator, order, noise, settings, bar, folder, identity)
    try:
        # also where somebody has switched gradients off
        with torch.enable_grad():
            return run.train(None if saved is None else run.restore(*saved))
    finally:
        bar.close()
        flow.eval()


def _objectives(
    objective: str | Objective | Sequence[str | Objective] | None, flow: Flow
) -> list[tuple[str, Objective]]:
    """The objectives to run in turn, each with what to call it."""
    if objective is None:
        recipe = flow.recipe
        objective = "likelihood" if recipe is None else MODELS[recipe.builder].objective
    if isinstance(objective, (str, Objective)):
        objective = [objective]
    named = [
        (one, build_objective(one, flow)) if isinstance(one, str) else (type(one).__name__, one)
        for one in objective
    ]
    if not named:
        raise ValueError("at least one objective is needed")
    for name, one in named:
        if not isinstance(one, Objective):
            raise TypeError(f"an objective is a name or an Objective, got {name}")
        if one.flow is not flow:
            raise ValueError(
                f"{name} was made for another flow than the one to fit; build it with this flow"
            )
        one.to(flow.device)
    return named


def as_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``"auto"`` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _unscaled(flow: Flow) -> bool:
    """Whether the flow's standardisation is still the identity."""
    return bool((flow.scaling.loc == 0).all() and (flow.scaling.scale == 1).all())


@torch.no_grad()
def _check(flow: Flow, x: torch.Tensor, what: str) -> None:
    """Refuse data that the flow can never give a density; one row of it would void every mean."""
    flow.scaling.check(x, what)
    flow.transform.check(flow.scaling.inverse(x).value, what)


def _initialize(
    flow: Flow, rows: Rows, batch_size: int, noise: torch.Generator, *, standardize: bool
) -> None:
    """Fill what the flow takes from data, with the training rows."""
    count = min(len(rows), STANDARDIZE_ROWS)
    many = rows.batch(torch.arange(count))
    if many.weight is not None:  # what looks at rows alike is shown each as often as it counts
        drawn = torch.multinomial(many.weight, count, replacement=True, generator=noise)
        many = rows.batch(drawn.cpu())
    if standardize:
        flow.standardize(many.x, many.context)
    few = many.map(lambda part: part[:batch_size])
    flow.initialize(few.x, few.context, Request(generator=noise))
