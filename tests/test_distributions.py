"""Bases: densities against torch's and quadrature, samples against densities, temperature."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import cnf
from cnf.distributions import (
    Laplace,
    Logistic,
    Mixture,
    MixtureOfGaussians,
    MultivariateNormal,
    Normal,
    Resampled,
    StudentT,
    Transformed,
    Uniform,
    Wrapped,
)
from cnf.nets import MLP
from cnf.transforms import Diagonal

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(base: torch.nn.Module, spread: float = 0.4) -> torch.nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in base.parameters():
            parameter += spread * torch.randn_like(parameter)
    return base.double()


def net(outputs: int) -> MLP:
    return MLP(2, outputs, hidden=(8,), zero_last=False)


BASES = {
    "normal": lambda: Normal(1),
    "trained normal": lambda: Normal(1, trainable=True),
    "laplace": lambda: Laplace(1, trainable=True),
    "logistic": lambda: Logistic(1, trainable=True),
    "uniform": lambda: Uniform(1, loc=0.3, scale=2.0),
    "student": lambda: StudentT(1, df=4.0, trainable=True),
    "full normal": lambda: MultivariateNormal(1),
    "gaussians": lambda: MixtureOfGaussians(1, 3),
    "mixture": lambda: Mixture([Normal(1, loc=-2.0), Laplace(1, trainable=True)]),
    "resampled": lambda: Resampled(1, MLP(1, 1, hidden=(8,)), truncation=20),
    "wrapped": lambda: Wrapped(torch.distributions.Gumbel(torch.zeros(1), torch.ones(1))),
    "transformed": lambda: Transformed(Diagonal(1, scale=2.0), Normal(1)),
}
CONDITIONAL = {
    "normal": lambda: Normal(3, conditioner=net(Normal.outputs(3))),
    "student": lambda: StudentT(3, conditioner=net(StudentT.outputs(3))),
    "full normal": lambda: MultivariateNormal(3, conditioner=net(MultivariateNormal.outputs(3))),
    "gaussians": lambda: MixtureOfGaussians(
        3, 4, conditioner=net(MixtureOfGaussians.outputs(3, 4))
    ),
    "mixture": lambda: Mixture([Normal(3), Laplace(3, loc=2.0)], conditioner=net(2)),
    "resampled": lambda: Resampled(
        3, MLP(3, 1, hidden=(8,), context_features=2), nodes=16, conditional=True
    ),
}


@pytest.mark.parametrize("name", BASES)
class TestEvery:
    def test_density_integrates_to_one_and_matches_samples(self, name):
        base = shaken(BASES[name]())
        grid = torch.linspace(-60, 60, 60_001, dtype=F64).unsqueeze(-1)
        step = grid[1] - grid[0]
        density = base.log_prob(grid).detach().exp()
        assert float((density * step).sum()) == pytest.approx(1, abs=3e-3)
        draws = base.rsample((20_000,), generator=seeded()).squeeze(-1)
        for level in (0.2, 0.5, 0.8):
            quantile = grid[(density * step).cumsum(0) >= level][0]
            share = (draws <= quantile).double().mean()
            assert float(share) == pytest.approx(level, abs=0.015)

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
    def test_shapes_and_dtype(self, name, batch, dtype):
        base = BASES[name]().to(dtype)
        z = base.rsample(batch, generator=seeded())
        assert z.shape == (*batch, 1)
        assert z.dtype == dtype
        log_prob = base.log_prob(z)
        assert log_prob.shape == batch
        assert log_prob.dtype == dtype
        assert log_prob.isfinite().all()

    def test_generator_decides_and_the_global_one_is_left_alone(self, name):
        base = BASES[name]()
        state = torch.get_rng_state()
        first = base.rsample((5,), generator=seeded(1))
        assert torch.equal(first, base.rsample((5,), generator=seeded(1)))
        assert not torch.equal(first, base.rsample((5,), generator=seeded(2)))
        assert torch.equal(torch.get_rng_state(), state)

    def test_temperature_narrows(self, name):
        base = shaken(BASES[name]())
        draws = [base.rsample((4000,), temperature=t, generator=seeded()).std() for t in (0.2, 1.0)]
        assert draws[0] < draws[1]

    def test_copies_agree(self, name):
        base = shaken(BASES[name]())
        z = torch.linspace(-1, 1, 5, dtype=F64).unsqueeze(-1)
        for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
            assert torch.equal(twin.log_prob(z), base.log_prob(z))
            assert repr(twin) == repr(base)


@pytest.mark.parametrize("name", CONDITIONAL)
class TestConditional:
    def test_context_moves_the_density_sample_by_sample(self, name):
        base = shaken(CONDITIONAL[name]())
        context = torch.randn(2, 4, 2, generator=seeded(), dtype=F64)
        z = torch.randn(2, 4, 3, generator=seeded(1), dtype=F64)
        together = base.log_prob(z, context)
        assert together.shape == (2, 4)
        torch.testing.assert_close(together[1, 2], base.log_prob(z[1, 2], context[1, 2]))
        assert not torch.isclose(together[0, 0], base.log_prob(z[0, 0], context[1, 1]))
        assert base.rsample((2, 4), context, generator=seeded()).shape == (2, 4, 3)

    def test_gradients_reach_the_conditioner(self, name):
        base = shaken(CONDITIONAL[name]())
        context = torch.randn(4, 2, generator=seeded(), dtype=F64, requires_grad=True)
        base.log_prob(torch.ones(4, 3, dtype=F64), context).sum().backward()
        assert context.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("base", "theirs"),
    [
        (Normal(3, loc=1.0, scale=2.0), torch.distributions.Normal(1.0, 2.0)),
        (Laplace(3, loc=1.0, scale=2.0), torch.distributions.Laplace(1.0, 2.0)),
        (StudentT(3, 4.0, loc=1.0, scale=2.0), torch.distributions.StudentT(4.0, 1.0, 2.0)),
        (Uniform(3, loc=1.0, scale=2.0), torch.distributions.Uniform(-1.0, 3.0, False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_densities_are_torchs(base, theirs):
    z = torch.linspace(-5, 5, 30).reshape(10, 3)
    torch.testing.assert_close(base.log_prob(z), theirs.log_prob(z).sum(-1))


def test_full_normal_is_torchs():
    covariance = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 0.7]], dtype=F64)
    loc = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
    base = MultivariateNormal(3, loc=loc, covariance=covariance)
    theirs = torch.distributions.MultivariateNormal(loc, covariance)
    z = torch.randn(5, 3, generator=seeded(), dtype=F64)
    torch.testing.assert_close(base.log_prob(z), theirs.log_prob(z))
    draws = base.rsample((50_000,), generator=seeded())
    torch.testing.assert_close(draws.T.cov(), covariance, atol=0.05, rtol=0.05)
    for given in ({"loc": loc}, {"covariance": covariance}):
        assert MultivariateNormal(3, **given).rsample((2,)).dtype == F64


def test_uniform_has_no_gradient_that_is_not_a_number():
    z = torch.tensor([[0.5], [2.0]], requires_grad=True)
    base = Uniform(1, trainable=True)
    log_prob = base.log_prob(z)
    assert log_prob[1] == -math.inf
    log_prob.sum().backward()
    assert base.log_scale.grad.isfinite().all()


def test_resampled_normalizer_is_honest():
    base = shaken(Resampled(2, MLP(2, 1, hidden=(8,))), spread=1.0)
    used, estimate, error = base.normalizer(generator=seeded())
    assert abs(used - estimate) < 5 * error + 0.01
    other, _, _ = copy.deepcopy(base).renew(1, nodes=4096).normalizer(samples=2)
    assert abs(other - estimate) < 5 * error + 0.003
    axis = torch.linspace(-7, 7, 281, dtype=F64)
    density = base.log_prob(torch.cartesian_prod(axis, axis)).detach().exp()
    assert float(density.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=0.01)


def test_rsample_is_differentiable():
    for name in ("trained normal", "laplace", "logistic", "student", "full normal", "gaussians"):
        base = BASES[name]()
        base.rsample((4,), generator=seeded()).sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in base.parameters()), name


def test_wrapped_takes_batches_events_and_dtypes():
    loc = torch.zeros(2, 3)
    base = Wrapped(torch.distributions.MultivariateNormal(loc, torch.eye(3))).double()
    z = base.rsample((5,), generator=seeded())
    assert z.shape == (5, 2, 3)
    torch.testing.assert_close(base.log_prob(z), Normal((2, 3)).double().log_prob(z))
    cauchy = Wrapped(torch.distributions.Cauchy(torch.zeros(1), torch.ones(1)))
    with pytest.raises(ValueError, match="no finite mean"):
        cauchy.rsample((2,), temperature=0.5)
    with pytest.raises(ValueError, match=r"expand it to the event"):
        Wrapped(torch.distributions.Normal(0.0, 1.0))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="depend on a context"):
        CONDITIONAL["normal"]().log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="must return 6 numbers per sample, it returned 5"):
        Normal(3, conditioner=net(5)).log_prob(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="positive definite"):
        MultivariateNormal(2, covariance=-torch.eye(2))
    with pytest.raises(ValueError, match="one event shape"):
        Mixture([Normal(1), Normal(2)])
    with pytest.raises(ValueError, match="scale must be positive"):
        Laplace(1, scale=0.0)


def test_any_base_carries_a_flow():
    for name in ("student", "gaussians", "resampled", "wrapped"):
        flow = cnf.Flow(Diagonal(1), BASES[name]())
        assert flow.log_prob(flow.sample((4,))).shape == (4,)


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_a_temperature_is_finite_and_not_negative(temperature):
    with pytest.raises(ValueError, match="temperature must be finite and not negative, got"):
        cnf.Flow(Diagonal(1), Normal(1)).sample((2,), temperature=temperature)


@pytest.mark.parametrize("shape", [5, (-1,), (2.0,), "5"])
def test_a_sample_shape_is_a_tuple_of_sizes(shape):
    flow = cnf.Flow(Diagonal(1), Normal(1))
    for draw in (flow.sample, flow.rsample, flow.sample_and_log_prob):
        with pytest.raises(ValueError, match=r"tuple of sizes, as in flow.sample\(\(1000,\)\)"):
            draw(shape)


@pytest.mark.parametrize("times", [[], 0.5, [-0.5, 0.5], [0.0, 2.0], [0.0, 0.7, 0.3]])
def test_times_of_a_path_are_checked(times):
    flow = cnf.ffjord(1, hidden=(4,))
    with pytest.raises(ValueError, match=r"increasing numbers in \[0, 1\]"):
        flow.trajectory(torch.zeros(2, 1), times)


def test_parts_of_other_packages_are_refused_at_once():
    flow, normal = cnf.Flow(Diagonal(1), Normal(1)), torch.distributions.Normal(torch.zeros(1), 1.0)
    for build, message in (
        (lambda: cnf.Flow(Diagonal(1), normal), r"base must be a Base.* cnf.distributions.Wrapped"),
        (lambda: cnf.Flow([Diagonal(1)], Normal(1)), "transform must be a Transform"),
        (lambda: cnf.Chain([Diagonal(1), flow]), "got Flow; of a flow, take flow.transform"),
        (lambda: cnf.Inverse(torch.nn.Linear(1, 1)), "got Linear"),
    ):
        with pytest.raises(TypeError, match=message):
            build()


@pytest.mark.parametrize(
    "first", [torch.nn.BatchNorm1d(1), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout())]
)
def test_an_encoder_may_want_batches(first):
    encoder = torch.nn.Sequential(first, torch.nn.Linear(1, 2))
    flow = cnf.realnvp(2, layers=2, hidden=(8,), context_features=2)
    flow = cnf.Flow(flow.transform, Normal(2), context_features=1, encoder=encoder)
    x, context = torch.randn(8, 2, generator=seeded()), torch.randn(8, 1, generator=seeded())
    flow.standardize(x, context)
    assert encoder.training
    assert first.training
    assert not flow.optional_context
    assert all(buffer.isfinite().all() for buffer in encoder.buffers())
    with pytest.raises(ValueError, match="this flow is conditional"):
        flow.log_prob(x)


def test_an_encoder_may_look_classes_up():
    class Classes(torch.nn.Embedding):
        def forward(self, context):
            return super().forward(context[..., 0].long())

    flow = cnf.realnvp(2, layers=2, hidden=(8,), context_features=4)
    encoder = Classes(3, 4)
    flow = cnf.Flow(flow.transform, Normal(2), context_features=1, encoder=encoder)
    flow.standardize(torch.randn(3, 2, generator=seeded()), torch.tensor([[0.0], [1.0], [2.0]]))
    assert not flow.optional_context


def test_an_encoder_is_trained_along():
    encoder = MLP(5, 2, hidden=(8,), zero_last=False)
    inner = cnf.realnvp(3, layers=2, hidden=(8,), context_features=2)
    flow = cnf.Flow(inner.transform, Normal(3), context_features=5, encoder=encoder)
    x, context = torch.randn(4, 3, generator=seeded()), torch.randn(4, 5, generator=seeded())
    with torch.no_grad():
        for parameter in flow.transform.parameters():
            parameter += 0.3
    flow.log_prob(x, context).sum().backward()
    assert encoder.layers[0].weight.grad.abs().sum() > 0
    assert flow.sample((6,), context, generator=seeded()).shape == (6, 4, 3)
    torch.testing.assert_close(flow.log_prob(x, context), inner.log_prob(x, encoder(context)))
    draws, log_prob = flow.sample_and_log_prob((2,), context)
    torch.testing.assert_close(flow.log_prob(draws, context), log_prob)
    with pytest.raises(TypeError, match="no recipe"):
        flow.save("nowhere")
    with pytest.raises(ValueError, match="needs a context to encode"):
        cnf.Flow(inner.transform, Normal(3), encoder=encoder)
