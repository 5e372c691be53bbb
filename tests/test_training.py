from __future__ import annotations

import math
import re
import signal
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from cnf.data import DataError
from cnf.distributions import Normal
from cnf.flow import Flow
from cnf.models import ffjord, glow, realnvp
from cnf.objectives import FlowMatching, Loss, MaximumLikelihood, Objective
from cnf.ode import NonFiniteState, Solver
from cnf.training import History, TrainingError, checkpoint, fit
from cnf.training.averaging import Average
from cnf.training.validation import Validator
from cnf.transforms.base import Mapped, Transform


class Affine(Transform):
    """x = shift + context · slope + exp(log_scale) · z: maximum likelihood has a closed form."""

    def __init__(self, features: int, context_features: int = 0):
        super().__init__()
        self.shift = nn.Parameter(torch.full((features,), 0.5))
        self.slope = nn.Parameter(torch.zeros(context_features, features))
        self.log_scale = nn.Parameter(torch.full((features,), 0.5))
        self.initialized = 0

    def _mean(self, context: Tensor | None) -> Tensor:
        return self.shift if context is None else self.shift + context @ self.slope

    def forward(self, z, context=None, request=None):
        log_det = self.log_scale.sum().expand(z.shape[:-1])
        return Mapped(self._mean(context) + self.log_scale.exp() * z, log_det, {})

    def inverse(self, x, context=None, request=None):
        log_det = -self.log_scale.sum().expand(x.shape[:-1])
        return Mapped((x - self._mean(context)) * (-self.log_scale).exp(), log_det, {})

    def initialize(self, x, context=None, request=None):
        self.initialized += 1


def affine(features: int = 2, context_features: int = 0) -> Flow:
    return Flow(
        Affine(features, context_features), Normal((features,)), context_features=context_features
    )


def numbers(flow: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gaussian(rows: int = 2000, features: int = 2, seed: int = 0) -> Tensor:
    noise = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    return noise * torch.arange(1, features + 1) + 3.0


class Failing(MaximumLikelihood):
    """A likelihood that fails at chosen calls, in chosen ways."""

    def __init__(self, flow, when, how):
        super().__init__(flow)
        self.when, self.how, self.calls = when, how, 0

    def forward(self, batch, *, generator=None, progress=0.0):
        self.calls += 1
        loss = super().forward(batch, generator=generator, progress=progress)
        return self.how(loss) if self.when(self.calls) else loss


def nan_loss(loss: Loss) -> Loss:
    return Loss(loss.total * math.nan, loss.terms)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NonFiniteState("the adjoint state is not finite", 0.5, 0.1, 10, "backward")


def nan_gradient(loss: Loss) -> Loss:
    return Loss(NanGradient.apply(loss.total), loss.terms)


def solver_error(loss: Loss) -> Loss:
    raise NonFiniteState("the state is not finite", 0.5, 0.1, 10)


def backward_error(loss: Loss) -> Loss:
    return Loss(FailingBackward.apply(loss.total), loss.terms)


def interrupt(loss: Loss) -> Loss:
    raise KeyboardInterrupt


# ---- what training reaches ---------------------------------------------------------------------


def test_reaches_the_maximum_of_the_likelihood():
    x = gaussian()
    flow, validation = affine(), gaussian(seed=1)
    history = fit(flow, x, validation=validation, steps=300, lr=4e-2)
    best = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(validation).sum(-1)
    assert -flow.log_prob(validation).mean().item() == pytest.approx(-best.mean().item(), abs=2e-3)
    assert history.stopped == "steps"
    assert history.steps == 300
    assert history.skipped == 0
    assert history.nfe is None
    assert history.best_validation == min(nats for _, _, nats in history.validations)
    assert history.validations[0][0] == 0
    assert history.validations[-1][0] == 300
    assert history.losses[-1][0] == 300
    assert history.stages == [("likelihood", 0)]


def test_context_is_learnt():
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(3000, 1, generator=generator) * 2 + 1
    x = 3 * context + 0.1 * torch.randn(3000, 1, generator=generator)
    flow = affine(1, 1)
    fit(flow, x, context=context, steps=300, lr=6e-2)
    at = torch.tensor([[0.0], [1.0]])
    draws = flow.sample((2000,), at, generator=generator)
    assert draws.mean(0).flatten().tolist() == pytest.approx([0.0, 3.0], abs=0.05)
    assert draws.std(0).flatten().tolist() == pytest.approx([0.1, 0.1], abs=0.02)


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for seed in (0, 0, 1):
        flow = affine()
        fit(flow, gaussian(300), steps=30, batch_size=32, seed=seed)
        runs.append(numbers(flow))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    fit(affine(), gaussian(300), steps=5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_best_weights_are_kept():
    class Diverging(MaximumLikelihood):
        """Learns for a while, then unlearns."""

        def forward(self, batch, *, generator=None, progress=0.0):
            loss = super().forward(batch, generator=generator, progress=progress)
            return loss if progress < 0.5 else Loss(-loss.total, loss.terms)

    flow = affine()
    validation = gaussian(500, seed=1)
    history = fit(
        flow,
        gaussian(),
        objective=Diverging(flow),
        validation=validation,
        steps=200,
        lr=2e-2,
        schedule="constant",
        average=0.0,
    )
    assert 0 < history.best_step < 200
    assert history.validations[-1][2] > history.best_validation + 0.01
    found = -flow.log_prob(validation).double().mean().item()
    assert found == pytest.approx(history.best_validation, abs=1e-5)


def test_averages_follow_their_recursion():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    average, expected = Average([weight], decay=0.5), torch.zeros(3, dtype=torch.float64)
    for n in range(1, 20):
        with torch.no_grad():
            weight.fill_(float(n))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    torch.testing.assert_close(average.values[0], expected)
    with average.applied():
        torch.testing.assert_close(weight.data, expected)
    assert weight.tolist() == [19.0] * 3


def test_patience_stops_early():
    history = fit(
        affine(), gaussian(300), steps=5000, lr=0.1, patience=3, validate_every=20, batch_size=64
    )
    assert history.stopped == "patience"
    assert history.steps < 5000
    assert history.validations[-1][0] - history.best_step == 60


def test_a_fitted_flow_is_scored_as_it_was_validated():
    flow, x = ffjord(2, hidden=(8,), normalization="batchnorm"), gaussian(300)
    fit(flow, x, steps=2)
    assert not any(module.training for module in flow.modules())
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x[:5]), flow.log_prob(x)[:5])


def test_gradients_that_are_switched_off_are_no_obstacle():
    with torch.no_grad():
        history = fit(affine(), gaussian(300), steps=2)
    assert history.steps == 2


# ---- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 10**9])
def test_seconds_are_kept(steps):
    rates = []

    class Watching(MaximumLikelihood):
        def forward(self, batch, *, generator=None, progress=0.0):
            rates.append(progress)
            return super().forward(batch, generator=generator, progress=progress)

    flow = affine()
    start = time.perf_counter()
    history = fit(flow, gaussian(), objective=Watching(flow), steps=steps, seconds=0.5)
    assert time.perf_counter() - start < 3.0
    assert history.stopped == "seconds"
    assert history.seconds == pytest.approx(0.5, abs=0.3)
    assert rates == sorted(rates)
    assert rates[0] < 0.1
    assert rates[-1] > 0.9
    assert len(history.losses) <= 501
    assert history.validations[-1][0] == history.steps


def test_steps_end_first():
    assert fit(affine(), gaussian(300), steps=5, seconds=100.0).stopped == "steps"


def test_slow_validation_is_bounded():
    class Slow(Affine):
        def inverse(self, x, context=None, request=None):
            if not torch.is_grad_enabled():
                time.sleep(0.03)
            return super().inverse(x, context, request)

    flow = Flow(Slow(2), Normal((2,)))
    history = fit(flow, gaussian(), validation=gaussian(5000), seconds=1.0)
    assert history.seconds == pytest.approx(1.0, abs=0.4)
    assert 2 <= len(history.validations) <= 8


def test_what_is_only_scored_leaves_no_trace():
    modes = []

    class Watching(Affine):
        def inverse(self, x, context=None, request=None):
            if not torch.is_grad_enabled():
                modes.append(self.training)
            return super().inverse(x, context, request)

    flow = Flow(Watching(2), Normal((2,)))
    fit(flow, gaussian(300), seconds=0.1, initialize=False)
    assert modes
    assert not any(modes)


def test_objectives_run_in_turn():
    seen = []

    class Watching(MaximumLikelihood):
        def forward(self, batch, *, generator=None, progress=0.0):
            seen.append((self, progress))
            return super().forward(batch, generator=generator, progress=progress)

    flow = affine()
    first, second = Watching(flow), Watching(flow)
    history = fit(flow, gaussian(300), objective=(first, second), shares=(1, 3), steps=40)
    assert [owner for owner, _ in seen] == [first] * 10 + [second] * 30
    assert seen[10][1] == 0.0
    assert history.stages == [("Watching", 0), ("Watching", 10)]
    assert history.steps == 40


# ---- data --------------------------------------------------------------------------------------


class Points(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(index % 2)


class Standard:
    """A target: a standard normal in two dimensions."""

    def sample(self, n, generator=None):
        return torch.randn(n, 2, generator=generator)

    def log_prob(self, x):
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)


@pytest.mark.parametrize(
    "data",
    [
        gaussian(200).double(),
        gaussian(200).numpy().astype(np.float64),
        gaussian(200).tolist(),
        np.arange(400).reshape(200, 2),
        Points(gaussian(200)),
        TensorDataset(gaussian(200), torch.zeros(200)),
        Standard(),
    ],
    ids=["float64", "array", "list", "integers", "dataset", "tensors", "target"],
)
def test_data_of_every_kind(data):
    flow = affine()
    history = fit(flow, data, steps=3)
    assert history.steps == 3
    assert flow.dtype == torch.float32
    assert flow.transform.initialized == 1


def test_data_with_context_of_every_kind():
    x, context = gaussian(200, 1), gaussian(200, 3)

    class Table:
        pass

    table = Table()
    table.x, table.context = x, context
    for data in ((x, context), (x.numpy(), context.numpy()), table, TensorDataset(x, context)):
        assert fit(affine(1, 3), data, steps=2).steps == 2
    assert fit(affine(1, 3), (x, context), validation=(x[:9], context[:9]), steps=2).steps == 2
    assert fit(affine(1), x[:, 0], steps=2).steps == 2


def test_a_large_dataset_is_read_when_needed(monkeypatch):
    monkeypatch.setattr("cnf.training.data.IN_MEMORY", 100)
    x = gaussian(200)
    streamed, whole = affine(), affine()
    fit(streamed, Points(x), steps=5, batch_size=16)
    fit(whole, x, steps=5, batch_size=16)
    assert same(numbers(streamed), numbers(whole))


def test_standardisation_comes_from_the_training_rows():
    flow = affine()
    x, validation = gaussian(500), gaussian(500) + 100
    fit(flow, x, validation=validation, steps=1)
    torch.testing.assert_close(flow.scaling.loc, x.mean(0))


def test_a_value_may_vanish_beside_larger_ones():
    x = gaussian(50).double()
    x[3, 1] = 1e-60
    assert fit(affine(), x, steps=1).steps == 1


def test_a_fitted_flow_is_not_initialised_again():
    flow = affine()
    fit(flow, gaussian(500), steps=1)
    loc = flow.scaling.loc.clone()
    fit(flow, gaussian(500) + 1, steps=1)
    assert torch.equal(flow.scaling.loc, loc)
    fit(flow, gaussian(500) + 1, steps=1, initialize=True)
    assert not torch.equal(flow.scaling.loc, loc)


def test_a_flow_that_could_not_be_initialised_is_not():
    flow = glow((1, 4, 4), levels=1, depth=1, hidden=(4,), dequantize="uniform", bins=8)
    pixels = torch.randint(8, (20, 1, 4, 4)).float()
    with pytest.raises(DataError, match="takes integers"):
        flow.initialize(pixels / 2)
    assert not flow.initialized
    assert flow.initialize(pixels).initialized


@pytest.mark.parametrize(
    ("data", "context", "message"),
    [
        (gaussian(10), None, "at least 20 rows"),
        (gaussian(50, 3), None, r"takes data of shape \(rows, 2\), got \(50, 3\)"),
        (gaussian(50), gaussian(50, 1), "takes none"),
        (torch.cat([gaussian(50), torch.full((1, 2), math.nan)]), None, "first in row 50"),
        (np.array([["a", "b"]] * 50), None, "must be numbers"),
        ((gaussian(50), None, None), None, "got 3 parts"),
        (gaussian(50).to(torch.complex64), None, "real numbers"),
        (gaussian(50).double() * 1e-60, None, r"column 0, .*e-6\d in row 0"),
    ],
)
def test_unsuitable_data_is_refused(data, context, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(affine(), data, context=context, steps=1)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "the data has no context"),
        (gaussian(49, 3), r"must have shape \(50, 3\)"),
        (gaussian(50, 2), r"must have shape \(50, 3\)"),
    ],
)
def test_an_unsuitable_context_is_refused(context, message):
    with pytest.raises(ValueError, match=message):
        fit(affine(2, 3), gaussian(50), context=context, steps=1)


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"average": 1.0}, r"average must lie in \[0, 1\)"),
        ({"warmup": 1.0}, "warmup is a fraction"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"schedule": "linear"}, "'cosine' or 'constant', got 'linear'"),
        ({"on_failure": "ignore"}, "'skip' or 'stop', got 'ignore'"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"shares": (1, 2)}, "one entry per objective"),
        ({"shares": (0,)}, "shares must be positive"),
        ({"resume": True}, "pass out="),
        ({"objective": ()}, "at least one objective"),
        ({"objective": "likelyhood"}, "Did you mean 'likelihood'"),
    ],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(affine(), gaussian(100), **{"steps": 1, **arguments})


def test_an_objective_of_another_flow_is_refused():
    with pytest.raises(ValueError, match="another flow"):
        fit(affine(), gaussian(100), objective=MaximumLikelihood(affine()), steps=1)
    with pytest.raises(TypeError, match="an objective is a name or an Objective, got int"):
        fit(affine(), gaussian(100), objective=(3,), steps=1)


def test_a_flow_without_parameters_is_refused():
    flow = affine().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(flow, gaussian(100), steps=1)


def test_an_objective_has_parameters_of_its_own():
    class Tempered(Objective):
        def __init__(self, flow):
            super().__init__(flow)
            self.temperature = nn.Parameter(torch.zeros(()))

        def forward(self, batch, *, generator=None, progress=0.0):
            total = -self.flow.log_prob(batch.x).mean() + (self.temperature - 1).square()
            return Loss(total, {})

    flow = affine()
    objective = Tempered(flow)
    fit(flow, gaussian(100), objective=objective, steps=100, lr=0.1)
    assert objective.temperature.item() == pytest.approx(1.0, abs=0.1)


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (nan_loss, "non-finite loss"),
        (nan_gradient, "non-finite gradient"),
        (solver_error, "NonFiniteState"),
        (backward_error, "NonFiniteState"),
    ],
)
def test_failed_steps_are_skipped_and_counted(how, name):
    flow = affine()
    objective = Failing(flow, lambda call: call % 5 == 2, how)
    history = fit(flow, gaussian(300), objective=objective, steps=50)
    assert history.skipped == 10
    assert history.failures == {name: 10}
    assert history.stopped == "steps"
    assert "10 steps skipped" in history.summary()
    assert all(torch.isfinite(tensor).all() for tensor in numbers(flow).values())


@pytest.mark.parametrize("how", [nan_loss, nan_gradient, solver_error, backward_error])
def test_persistent_failure_stops_with_the_best_weights(how, tmp_path):
    flow = affine()
    objective = Failing(flow, lambda call: call > 50, how)
    with pytest.raises(TrainingError, match="stopped at step 70: 20 steps failed") as caught:
        fit(flow, gaussian(300), objective=objective, steps=200, lr=1e-2, out=tmp_path)
    history = caught.value.history
    assert history.stopped == "failures"
    assert "a lower lr" in str(caught.value)
    assert history.best_validation == min(nats for _, _, nats in history.validations)
    assert all(torch.isfinite(tensor).all() for tensor in numbers(flow).values())


def test_frequent_failure_stops_too():
    flow = affine()
    objective = Failing(flow, lambda call: call % 2 == 0, nan_loss)
    with pytest.raises(TrainingError, match="31 steps failed"):
        fit(flow, gaussian(300), objective=objective, steps=200)


def test_a_run_in_which_every_step_fails_is_an_error():
    flow = affine()
    with pytest.raises(TrainingError, match="3 steps failed"):
        fit(flow, gaussian(300), objective=Failing(flow, lambda call: True, nan_loss), steps=3)


def test_a_short_time_in_which_every_step_fails_is_an_error_too():
    def slow(loss):
        time.sleep(0.1)
        return nan_loss(loss)

    flow = affine()
    with pytest.raises(TrainingError, match="steps failed"):
        fit(flow, gaussian(300), objective=Failing(flow, lambda call: True, slow), seconds=0.5)


def test_failure_can_stop_at_once():
    flow = affine()
    objective = Failing(flow, lambda call: call == 3, solver_error)
    with pytest.raises(TrainingError, match="stopped at step 3: 1 steps failed"):
        fit(flow, gaussian(300), objective=objective, steps=200, on_failure="stop")


def test_a_programming_error_is_not_skipped():
    def broken(loss):
        raise AttributeError("a mistake")

    flow = affine()
    with pytest.raises(AttributeError, match="a mistake"):
        fit(flow, gaussian(300), objective=Failing(flow, lambda call: True, broken), steps=3)


def test_poisoned_buffers_are_healed():
    class Tracking(Affine):
        def __init__(self):
            super().__init__(2)
            self.register_buffer("mean", torch.zeros(2))
            self.calls = 0

        def inverse(self, x, context=None, request=None):
            if self.training:
                self.calls += 1
                x = x * math.nan if self.calls == 5 else x
                self.mean.lerp_(x.detach().mean(0), 0.1)
            return super().inverse(x - 0 * self.mean, context, request)

    flow = Flow(Tracking(), Normal((2,)))
    history = fit(flow, gaussian(300), steps=40)
    assert history.skipped == 1
    assert torch.isfinite(flow.transform.mean).all()


def test_a_validation_that_fails_is_survived():
    class Blind(Affine):
        def inverse(self, x, context=None, request=None):
            if not self.training and not torch.is_grad_enabled():
                raise NonFiniteState("the state is not finite")
            return super().inverse(x, context, request)

    flow = Flow(Blind(2), Normal((2,)))
    history = fit(flow, gaussian(300), steps=30, lr=1e-2)
    assert history.best_validation is None
    assert history.validations == []
    assert history.failures.keys() == {"NonFiniteState in validation"}
    assert not torch.equal(flow.transform.shift, Affine(2).shift)


def test_a_validation_that_is_not_finite_is_counted():
    class Overflowing(Affine):
        def inverse(self, x, context=None, request=None):
            z, log_det, costs = super().inverse(x, context, request)
            return Mapped(z, log_det if self.training else log_det - math.inf, costs)

    history = fit(Flow(Overflowing(2), Normal((2,))), gaussian(300), steps=20)
    assert history.validations == []
    assert history.failures.keys() == {"non-finite validation"}


def test_a_validation_row_without_a_density_is_refused():
    x = gaussian(300).exp()
    held = x[:30].clone()
    held[7, 1] = 0
    flow = realnvp(2, support="positive")
    with pytest.raises(DataError, match=r"1 of 30 validation samples .* in row 7 of them: \("):
        fit(flow, x, validation=held, steps=1)
    images = torch.randint(0, 16, (50, 1, 4, 4)).float()
    flow = glow((1, 4, 4), levels=1, depth=1, hidden=(4, 4), dequantize="uniform", bins=16)
    with pytest.raises(DataError, match="from 0 to 15, got 1 validation samples"):
        fit(flow, images, validation=torch.cat([images[:9], images[:1] + 0.5]), steps=1)


# ---- interrupts and checkpoints ----------------------------------------------------------------


def test_an_interrupt_leaves_the_best_weights():
    flow = affine()
    objective = Failing(flow, lambda call: call == 60, interrupt)
    history = fit(flow, gaussian(300), objective=objective, steps=100)
    assert history.stopped == "interrupted"
    assert history.steps == 59
    assert history.best_step == 50


class Noisy(Failing):
    """Its noise must be the same after resuming."""

    def forward(self, batch, *, generator=None, progress=0.0):
        noise = torch.randn(batch.x.shape, generator=generator)
        return super().forward(
            batch._replace(x=batch.x + 0.1 * noise), generator=generator, progress=progress
        )


@pytest.mark.parametrize("stop", [1, 25, 47, 77])
def test_resuming_continues_to_the_bit(tmp_path, stop):
    def train(when, out=None, resume=False):
        flow = affine()
        objectives = [Noisy(flow, when, interrupt) for _ in range(2)]
        history = fit(
            flow,
            gaussian(300),
            objective=objectives,
            shares=(1, 3),
            steps=100,
            batch_size=64,
            weight_decay=0.01,
            out=out,
            resume=resume,
        )
        return numbers(flow), history

    whole, history = train(lambda call: False)
    calls = iter(range(1000))
    _, first = train(lambda call: next(calls) == stop, tmp_path)
    assert first.stopped == "interrupted"
    assert first.steps == stop
    resumed, second = train(lambda call: False, tmp_path, resume=True)
    assert same(whole, resumed)
    assert second.best_step == history.best_step
    assert second.best_validation == history.best_validation
    assert [v[::2] for v in second.validations] == [v[::2] for v in history.validations]
    assert second.stages == history.stages
    assert second.seconds >= first.seconds


@pytest.fixture
def heard():
    """Interrupts reach Python, also where it was started in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("of", "name", "call", "late"),
    [
        (Average, "update", 33, False),
        (Average, "update", 33, True),
        (Average, "update", 30, False),  # when a validation is due
        (Validator, "nats", 4, False),
        (Validator, "nats", 4, True),
        (torch, "_foreach_copy_", 7, True),  # the averaged weights, to be validated, come in
    ],
)
def test_no_moment_to_interrupt_is_a_bad_one(tmp_path, monkeypatch, of, name, call, late):
    def train(**settings):
        flow = affine()
        history = fit(flow, gaussian(300), batch_size=64, steps=60, **settings)
        return numbers(flow), [v[::2] for v in history.validations], history

    *whole, _ = train()
    function, calls = getattr(of, name), iter(range(1, 100))

    def struck(*given):
        now = next(calls) == call
        if now and not late:
            signal.raise_signal(signal.SIGINT)
        found = function(*given)
        if now and late:
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(of, name, struck)
        *_, first = train(out=tmp_path)
    assert (first.stopped, first.steps) == ("interrupted", 33 if call == 33 else 30)
    *resumed, _ = train(out=tmp_path, resume=True)
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    flow, again = affine(), affine()
    first = fit(flow, gaussian(300), steps=30, out=tmp_path, resume=True)
    second = fit(again, gaussian(300), steps=30, out=tmp_path, resume=True)
    assert same(numbers(flow), numbers(again))
    assert second.losses == first.losses
    assert second.stopped == "steps"
    longer = fit(affine(), gaussian(300), steps=40, out=tmp_path, resume=True)
    assert longer.steps == 40


def test_steps_that_are_enough_do_not_limit_what_a_time_validates_on(tmp_path):
    def rows(**budget):
        flow = ffjord(2, hidden=(8,))
        fit(
            flow,
            gaussian(300),
            objective=("flow-matching", "likelihood"),
            validation=gaussian(1000, seed=1),
            batch_size=32,
            out=tmp_path,
            **budget,
        )
        _, state = checkpoint.read(tmp_path)
        return state["validation_rows"]

    assert rows(seconds=0.5) == 1000
    assert rows(steps=20) == 256


def test_resuming_something_else_is_refused(tmp_path):
    fit(affine(), gaussian(300), steps=5, out=tmp_path)
    with pytest.raises(ValueError, match="made with another flow"):
        fit(affine(3), gaussian(300, 3), steps=5, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="made with another seed: it has 0, this fit has 1"):
        fit(affine(), gaussian(300), steps=5, out=tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match="another number of training rows"):
        fit(affine(), gaussian(400), steps=5, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another batch size"):
        fit(affine(), gaussian(300), steps=5, out=tmp_path, resume=True, batch_size=7)

    def another(resume, **arguments):
        flow = realnvp(2, hidden=(4,), **arguments)
        fit(flow, gaussian(300).exp(), steps=5, out=tmp_path / "nice", resume=resume)

    another(False, support="positive")
    with pytest.raises(ValueError, match=r"another structure .*\(support\)"):
        another(True)
    with pytest.raises(ValueError, match=r"\): ReLU\(\)'\], .*: Tanh\(\)'\]"):
        another(True, support="positive", activation="tanh")
    another(True, support="positive")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a checkpoint of a fit"):
        fit(affine(), gaussian(300), steps=5, out=tmp_path, resume=True)


def test_a_run_goes_on_with_another_solver(tmp_path):
    solvers = (
        Solver("rk4", step_size=0.5),
        Solver("bosh3", compile="eager"),
        # its text has parentheses, and goes on over several lines
        Solver("dopri5", options={"jump_t": torch.linspace(0.1, 0.9, 17)}),
    )
    for steps, solver in enumerate(solvers, 1):
        flow = ffjord(2, hidden=(4,), solver=solver)
        history = fit(flow, gaussian(300), steps=2 * steps, out=tmp_path, resume=True)
    assert history.steps == 6


@pytest.mark.parametrize("end_time", [1.0, 2.0])
def test_a_structure_says_what_earlier_checkpoints_say(end_time):
    flow = ffjord(2, hidden=(4,), end_time=end_time, solver=Solver("rk4", step_size=0.5))
    earlier = [
        re.sub(r"solver=Solver\([^()]*\)", "", line).strip()
        for line in repr(flow).splitlines()
        if "Parameter containing:" not in line
    ]
    assert checkpoint.structure(flow) == earlier


def test_a_poisoned_state_is_never_written(tmp_path):
    class Poisoning(MaximumLikelihood):
        def forward(self, batch, *, generator=None, progress=0.0):
            if progress >= 0.5:
                with torch.no_grad():
                    self.flow.transform.shift.fill_(math.nan)
            return super().forward(batch, generator=generator, progress=progress)

    flow = affine()
    with pytest.raises(TrainingError):
        fit(flow, gaussian(300), objective=Poisoning(flow), steps=100, out=tmp_path)
    from cnf.training.checkpoint import read

    tensors, state = read(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert state["history"]["steps"] <= 50
    assert torch.isfinite(flow.transform.shift).all()


# ---- history and progress ----------------------------------------------------------------------


def test_history_survives_json():
    history = fit(affine(), gaussian(300), steps=20)
    assert History.from_json(history.to_json()) == history
    assert repr(history).startswith("History(20 steps in ")


def test_progress_is_shown_when_asked(capsys):
    fit(affine(), gaussian(300), steps=20, progress=True)
    shown = capsys.readouterr().err
    for part in ("likelihood", "100%", "loss", "nats", "steps/s", "0 s left"):
        assert part in shown
    fit(affine(), gaussian(300), steps=20, progress=False)
    fit(affine(), gaussian(300), steps=20)
    assert capsys.readouterr().err == ""


def test_progress_needs_no_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert fit(affine(), gaussian(300), steps=5, progress=True).steps == 5
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_a_gpu(tmp_path):
    flow = affine()
    fit(flow, gaussian(), steps=600, lr=2e-2, device="cuda", out=tmp_path)
    assert flow.device.type == "cuda"
    torch.testing.assert_close(
        flow.sample((5000,)).mean(0).cpu(), torch.full((2,), 3.0), atol=0.2, rtol=0
    )
    again = fit(affine(), gaussian(), steps=610, lr=2e-2, device="cuda", out=tmp_path, resume=True)
    assert again.steps == 610


def test_auto_takes_what_there_is():
    flow = affine()
    fit(flow, gaussian(100), steps=1, device="auto")
    assert flow.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_stage_that_has_enough_leaves_the_rest_to_the_next():
    flow = ffjord(2, hidden=(8,))
    first, second = FlowMatching(flow), MaximumLikelihood(flow)
    first.enough = 5
    history = fit(flow, gaussian(300), objective=(first, second), shares=(3, 1), steps=12)
    assert [step for _, step in history.stages] == [0, 5]
    assert history.steps == 12
    # alone, or last, an objective uses its whole budget
    assert fit(flow, gaussian(300), objective=first, steps=8).steps == 8
