"""One run of the training loop: its stages, the best weights, and what it writes down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cnf.objectives import Objective
from cnf.ode import count_nfe
from cnf.registry import unknown_name
from cnf.training import budget, checkpoint
from cnf.training.budget import Budget, Clock
from cnf.training.data import Order, Rows
from cnf.training.history import History
from cnf.training.interrupts import held_back
from cnf.training.progress import Bar
from cnf.training.update import NUMERICAL, OPTIMIZERS, Failures, StepFailed, Updater
from cnf.training.validation import Timetable, Validator

if TYPE_CHECKING:
    from cnf.flow import Flow

RECORDS = 500  # losses written down per stage, each the mean of the steps since the one before
WRITE_EVERY = 60.0  # seconds between checkpoints where validations are rare


class TrainingError(RuntimeError):
    """Training that had to stop; the flow has the best weights so far.

    Attributes:
        history: what happened until then.
    """

    def __init__(self, message: str, history: History):
        super().__init__(message)
        self.history = history


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; the arguments of ``fit`` by the same names."""

    shares: tuple[float, ...]
    steps: int | None
    seconds: float | None
    optimizer: str
    lr: float | None
    weight_decay: float
    warmup: float
    schedule: str
    clip: float | None
    average: float
    patience: int | None
    validate_every: int | None
    on_failure: str

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the budget in [0, 1), got {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {self.clip}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 validation, got {self.patience}")
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"validate_every must be at least 1, got {self.validate_every}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        if self.on_failure not in ("skip", "stop"):
            raise ValueError(f"on_failure must be 'skip' or 'stop', got {self.on_failure!r}")


@dataclasses.dataclass
class Stage:
    """Where the loop stands within one objective."""

    index: int
    budget: Budget
    updater: Updater
    timetable: Timetable
    stale: int = 0  # validations since the best
    failures: Failures = dataclasses.field(default_factory=Failures)
    failure: StepFailed | None = None  # the latest
    losses: list[float] = dataclasses.field(default_factory=list)  # not recorded yet
    recorded: float = 0.0  # the progress when losses were last recorded


class Run:
    """The objectives in turn, on one flow; see ``fit`` for what it does.

    Args:
        flow: the flow.
        objectives: what to minimise, in turn, each with its name.
        rows: the training rows.
        validator: scores the flow on held-out rows.
        order: which rows come when.
        noise: the objectives' noise, on the flow's device.
        settings: how to train.
        bar: shows how it goes.
        folder: where checkpoints go, or None.
        identity: what a checkpoint must have been made with to be continued.
    """

    def __init__(
        self,
        flow: Flow,
        objectives: list[tuple[str, Objective]],
        rows: Rows,
        validator: Validator,
        order: Order,
        noise: torch.Generator,
        settings: Settings,
        bar: Bar,
        folder: Path | None,
        identity: dict[str, Any],
    ):
        self.flow = flow
        self.objectives = objectives
        self.rows = rows
        self.validator = validator
        self.order = order
        self.noise = noise
        self.settings = settings
        self.bar = bar
        self.folder = folder
        self.identity = identity
        self.history = History()
        self.best = _state(flow)
        self.clock = Clock()
        self.written = 0.0
        self.work = {"forward": 0, "solves": 0}

    def train(self, stage: Stage | None = None) -> History:
        """Run what is left of the budget and give the flow its best weights.

        Args:
            stage: where an earlier run stopped, from ``restore``.
        """
        history = self.history
        try:
            if stage is None:
                # before the clock starts: torch's first optimiser takes seconds to import
                stage = self._stage(0, 0, 0.0)
                self.clock = Clock()
                self._begin(stage)
            while True:
                history.stopped = self._run(stage)
                self._write(stage)
                if stage.index + 1 == len(self.objectives):
                    return history
                self.flow.load_state_dict(self.best)
                stage = self._stage(stage.index + 1, history.steps, self.clock.elapsed())
                self._begin(stage)
        except KeyboardInterrupt:
            history.stopped = "interrupted"
            if stage is not None:
                self._write(stage)
            return history
        finally:
            history.seconds = self.clock.elapsed()
            self.flow.load_state_dict(self.best)

    # ---- stages ----------------------------------------------------------------------------

    def _begin(self, stage: Stage) -> None:
        """Note that a stage starts; before the first, look at the flow as it is."""
        self.history.stages.append((self.objectives[stage.index][0], self.history.steps))
        if stage.index == 0:
            self._limit_validation(stage)
            self._validate(stage, 0.0)

    def _stage(self, index: int, step: int, elapsed: float) -> Stage:
        """The stage of objective ``index``, starting at a step and a time."""
        settings = self.settings
        objective = self.objectives[index][1]
        share = budget.stage(
            index,
            settings.shares,
            settings.steps,
            settings.seconds,
            start=(step, elapsed),
            enough=objective.enough,
        )
        updater = Updater(
            objective,
            optimizer=settings.optimizer,
            lr=objective.lr if settings.lr is None else settings.lr,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            average=settings.average,
        )
        timed = settings.seconds is not None
        timetable = Timetable(settings.validate_every, timed=timed, step=step)
        return Stage(index, share, updater, timetable)

    def _limit_validation(self, stage: Stage) -> None:
        """Choose how many rows to validate on, so that validation stays a tenth of the work."""
        share = stage.budget
        # where an objective leaves the rest of a time to others, its steps do not bound the rows:
        # too few of them, and chance would choose the weights
        if self.settings.steps is not None and share.last_step is not None:
            rows = (share.last_step - share.first_step) * self.order.size
            self.validator.limit_work(rows, stage.updater.objective.step_cost)
        if share.end is not None:
            self.flow.eval()
            try:
                self.validator.limit_seconds(self.flow, share.end - share.start)
            except NUMERICAL as error:
                self._count(type(error).__name__)

    def _run(self, stage: Stage) -> str:
        """Run one objective until its budget or patience ends; say which."""
        history, patience, progress = self.history, self.settings.patience, 0.0
        self.flow.train()
        # an interrupt may have come between a step and the validation that was due after it
        resumed = history.steps > stage.timetable.step
        while True:
            # the last validation must fit into the seconds as well
            reserve = 1.2 * stage.timetable.latest
            elapsed = self.clock.elapsed()
            stopped = stage.budget.finished(history.steps, elapsed, reserve)
            if not stopped and patience is not None and stage.stale >= patience:
                stopped = "patience"
            if stopped:
                # a run in which nothing ever worked is no result, however short it was
                if stage.failure is not None and history.skipped == history.steps:
                    self._give_up(stage.failure, stage.updater.lr)
                break
            # never backwards, also where a validation turns out quicker than the one before
            progress = max(progress, stage.budget.progress(history.steps, elapsed, reserve))
            if resumed and stage.timetable.due(history.steps, progress, elapsed):
                self._validate(stage, progress)
            resumed = False
            self._step(stage, progress)
            history.seconds = elapsed = self.clock.elapsed()
            progress = max(progress, stage.budget.progress(history.steps, elapsed, reserve))
            if progress - stage.recorded >= 1 / RECORDS:
                self._record(stage, progress)
            if stage.timetable.due(history.steps, progress, elapsed):
                self._validate(stage, progress)
                self._write(stage)
            elif elapsed - self.written > WRITE_EVERY:
                self._write(stage)
            if self.bar.due:
                self._show(stage)
        if history.steps > stage.timetable.step:
            self._record(stage, 1.0)
            self._validate(stage, 1.0)
        self._show(stage)
        return stopped

    def _step(self, stage: Stage, progress: float) -> None:
        """Try one optimiser step; skip it, or end the run, if it fails."""
        settings, history = self.settings, self.history
        begun = history.steps - stage.budget.first_step if stage.index else None
        rate = budget.rate(progress, warmup=settings.warmup, schedule=settings.schedule, step=begun)
        step, order, noise = history.steps, self.order.state(), self.noise.get_state()
        failure: StepFailed | None = None
        try:
            with count_nfe() as work:
                batch = self.rows.batch(next(self.order))
                try:
                    loss = stage.updater.gradient(batch, self.noise, progress)
                except StepFailed as error:
                    failure = error
            with held_back():
                if failure is None:
                    stage.updater.step(rate)
                    stage.losses.append(loss)
                else:
                    history.skipped += 1
                    self._count(failure.what)
                    stage.updater.heal(self.best)
                    stage.failure = failure
                persists = stage.failures.persist(failure is not None)
                self._count_work(work.forward, work.solves)
                history.steps += 1
        except KeyboardInterrupt:
            if history.steps == step:
                # the step did not happen: it is to be made again on resuming, with the same noise
                self.order.restore(*order)
                self.noise.set_state(noise)
            raise
        if failure is not None and (persists or settings.on_failure == "stop"):
            self._give_up(failure, stage.updater.lr * rate)

    def _validate(self, stage: Stage, progress: float) -> None:
        """Score the averaged weights and keep them if they are the best so far."""
        history, start = self.history, self.clock.elapsed()
        self.flow.eval()
        with stage.updater.average.applied():
            failed = "non-finite validation"
            try:
                nats = self.validator.nats(self.flow)
            except NUMERICAL as error:
                nats, failed = math.inf, f"{type(error).__name__} in validation"
            with held_back():
                if math.isfinite(nats):
                    history.validations.append((history.steps, start, nats))
                else:
                    self._count(failed)
                best = math.inf if history.best_validation is None else history.best_validation
                stage.stale = 0 if nats < best else stage.stale + 1
                if nats < best:
                    history.best_step, history.best_validation = history.steps, nats
                # while no validation is finite, the latest weights are as good a guess as any
                if nats < best or (best == math.inf and stage.updater.healthy()):
                    self.best = _state(self.flow)
                stage.timetable.record(history.steps, progress, self.clock.elapsed() - start)
        self.flow.train()

    # ---- what went wrong -------------------------------------------------------------------

    def _count(self, what: str) -> None:
        self.history.failures[what] = self.history.failures.get(what, 0) + 1

    def _give_up(self, failure: StepFailed, lr: float) -> NoReturn:
        history = self.history
        history.stopped = "failures"
        kept = "the weights it began with are"
        if history.best_validation is not None:
            kept = (
                f"the best weights (step {history.best_step}, validation "
                f"{history.best_validation:.4g} nats) are"
            )
        counts = ", ".join(f"{count} × {what}" for what, count in history.failures.items())
        raise TrainingError(
            f"training stopped at step {history.steps}: {history.skipped} steps failed ({counts}). "
            f"The last one: {failure}. The flow is left as {kept} restored. What usually helps: "
            f"a lower lr (it was {lr:.2g}), a longer warmup, a smaller clip, float64, or for a "
            "continuous flow looser tolerances or a penalty on its kinetic energy",
            history,
        ) from failure

    # ---- what is written and shown ---------------------------------------------------------

    def _record(self, stage: Stage, progress: float) -> None:
        stage.recorded = progress
        if stage.losses:
            mean = math.fsum(stage.losses) / len(stage.losses)
            self.history.losses.append((self.history.steps, self.clock.elapsed(), mean))
            stage.losses.clear()

    def _count_work(self, forward: int, solves: int) -> None:
        self.work["forward"] += forward
        self.work["solves"] += solves
        if self.work["solves"]:
            self.history.nfe = self.work["forward"] / self.work["solves"]

    def _show(self, stage: Stage) -> None:
        history, settings = self.history, self.settings
        elapsed = self.clock.elapsed()
        rate = history.steps / elapsed if elapsed else 0.0
        whole = Budget(0, settings.steps, 0.0, settings.seconds)
        left = [] if settings.seconds is None else [settings.seconds - elapsed]
        if settings.steps is not None and rate:
            left.append((settings.steps - history.steps) / rate)
        latest = stage.losses or [loss for _, _, loss in history.losses[-1:]]
        self.bar.draw(
            whole.progress(history.steps, elapsed),
            name=self.objectives[stage.index][0],
            loss=latest[-1] if latest else None,
            validation=history.validations[-1][2] if history.validations else None,
            nfe=history.nfe,
            skipped=history.skipped,
            rate=rate,
            left=max(min(left, default=0.0), 0.0),
        )

    def _write(self, stage: Stage) -> None:
        """Write a checkpoint, unless the weights are not fit to be kept."""
        self.written = self.history.seconds = self.clock.elapsed()
        updater = stage.updater
        if self.folder is None or not updater.healthy():
            return
        order, place = self.order.state()
        tensors = {
            **checkpoint.pack("model", updater.objective.state_dict()),
            **checkpoint.pack("best", self.best),
            **checkpoint.pack("optimizer", checkpoint.optimizer_tensors(updater.optimizers)),
            **checkpoint.pack("average", {str(i): v for i, v in enumerate(updater.average.values)}),
            "order": order,
            "noise": self.noise.get_state(),
        }
        state = {
            "identity": self.identity,
            "history": dataclasses.asdict(self.history),
            "work": self.work,
            "stage": stage.index,
            "start": [stage.budget.first_step, stage.budget.start],
            "place": place,
            "validated": [stage.timetable.step, stage.timetable.progress],
            "validating": [stage.timetable.spent, stage.timetable.latest],
            "validation_rows": len(self.validator),
            "recorded": stage.recorded,
            "stale": stage.stale,
            "updates": updater.average.updates,
        }
        checkpoint.write(self.folder, tensors, state)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Stage:
        """Go back to where a checkpoint was written.

        Raises:
            CheckpointError: if it belongs to another flow or another fit.
        """
        for what, expected in self.identity.items():
            # checkpoints of earlier versions say less
            checkpoint.check_same(what, expected, state["identity"].get(what, expected))
        stage = self._stage(state["stage"], *state["start"])
        updater, timetable = stage.updater, stage.timetable
        updater.objective.load_state_dict(checkpoint.unpack("model", tensors))
        checkpoint.restore_optimizers(updater.optimizers, checkpoint.unpack("optimizer", tensors))
        for number, value in checkpoint.unpack("average", tensors).items():
            updater.average.values[int(number)].copy_(value)
        updater.average.updates = state["updates"]
        timetable.step, timetable.progress = state["validated"]
        timetable.spent, timetable.latest = state["validating"]
        stage.recorded, stage.stale = state["recorded"], state["stale"]
        self.best = checkpoint.unpack("best", tensors)
        self.order.restore(tensors["order"], state["place"])
        self.noise.set_state(tensors["noise"])
        self.validator.limit(state["validation_rows"])
        self.work = dict(state["work"])
        self.history = History.from_data(state["history"])
        self.history.stopped = ""
        self.clock = Clock(self.history.seconds)
        self.written = self.history.seconds
        return stage


def _state(flow: Flow) -> dict[str, Tensor]:
    """A copy of everything that the flow's numbers are."""
    return {name: tensor.detach().clone() for name, tensor in flow.state_dict().items()}
