"""Divergences against the trace of the autograd Jacobian: values, means, variances, refusals."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

import cnf
from cnf.divergence import CoupledBatchError, Exact, Hutchinson, HutchPlusPlus, push
from cnf.nets import TimeMLP
from cnf.registry import decode, encode

F64 = torch.float64
T = torch.tensor(0.3, dtype=F64)


class Plain(nn.Module):
    """A field that brings nothing but its velocity, on events of any shape."""

    def __init__(self, *event: int):
        super().__init__()
        self.event_dims = len(event)
        size = torch.Size(event).numel()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(size, size, generator=generator, dtype=F64))

    def forward(self, t, x, context=None):
        flat = x.flatten(x.dim() - self.event_dims)
        return (torch.sin(flat @ self.matrix.T) + t * flat).reshape(x.shape)


class Branching(Plain):
    """Decides in Python, sample by sample, which vmap cannot follow under a loop of its own."""

    def forward(self, t, x, context=None):
        rows = [row * 2 if float(row.detach().sum()) > 0 else row.sin() for row in x]
        return torch.stack(rows) @ self.matrix.T


class Unbatched(torch.autograd.Function):
    """x² with a forward-mode rule and without one for vmap."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


def traces(field, x, context=None, t=T):
    """The trace of each sample's Jacobian, by autograd."""
    events = getattr(field, "event_dims", 1)
    batch, event = x.shape[: x.dim() - events], x.shape[x.dim() - events :]
    found = []
    for i, row in enumerate(x.reshape(-1, *event)):
        c = None if context is None else context.reshape(-1, context.shape[-1])[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, c=c: field(t, row.unsqueeze(0), c).squeeze(0), row
        )
        found.append(jacobian.reshape(event.numel(), event.numel()).trace())
    return torch.stack(found).reshape(batch)


def points(*shape: int, seed: int = 1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def evaluate(divergence, field, x, context=None, seed=0, products=False):
    noise = divergence.draw(field, T, x, context, torch.Generator().manual_seed(seed))
    return divergence(field, T, x, context, noise, products)


@pytest.mark.parametrize("chunk", [None, 1, 2, 100])
@pytest.mark.parametrize("event", [(1,), (3,), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_exact_is_the_jacobians_trace(chunk, event, batch):
    field, x = Plain(*event), points(*batch, *event)
    found = evaluate(Exact(chunk), field, x)
    torch.testing.assert_close(found.velocity, field(T, x))
    torch.testing.assert_close(found.divergence, traces(field, x), atol=1e-12, rtol=1e-12)
    assert found.samples is None


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("conditioning", ["ignore", "concatsquash", "hyper", "blend"])
def test_a_fields_own_products_agree(conditioning, products):
    torch.manual_seed(0)
    field = TimeMLP(3, (8, 8), conditioning=conditioning, context_features=2).double()
    x, context = points(4, 3), points(4, 2, seed=2)
    found = evaluate(Exact(), field, x, context, products=products)
    torch.testing.assert_close(found.divergence, traces(field, x, context))
    plain = evaluate(Exact(), lambda t, x, c: field(t, x, c), x, context, products=True)
    torch.testing.assert_close(found.divergence, plain.divergence)
    if products:
        torch.testing.assert_close(found.products, plain.products)


@pytest.mark.parametrize("divergence", [Exact(), Exact(1), Hutchinson(2), HutchPlusPlus(2, 2)])
@pytest.mark.parametrize("event", [(3,), (2, 2, 2)], ids=str)
def test_inference_mode_needs_no_tape(divergence, event):
    field, x = Plain(*event), points(4, *event)
    expected = evaluate(divergence, field, x).divergence
    with torch.inference_mode():
        found = evaluate(divergence, field, x.clone()).divergence
    torch.testing.assert_close(found, expected.detach())


def test_control_flow_by_sample_falls_back_to_a_loop():
    field, x = Branching(3), points(5, 3)
    found = evaluate(Exact(), field, x)
    torch.testing.assert_close(found.divergence, traces(field, x))
    torch.testing.assert_close(evaluate(Exact(2), field, x).divergence, found.divergence)


def test_an_operation_unknown_to_vmap_falls_back_to_a_loop():
    def field(t, x, context):
        return Unbatched.apply(x)

    x, u = points(4, 2), points(3, 4, 2, seed=2)
    velocity, products = push(field, T, x, None, u)
    torch.testing.assert_close(velocity, x.square())
    torch.testing.assert_close(products, 2 * x * u)


class Counting(Plain):
    """It counts its calls in a buffer, as FFJORD's own code does."""

    def __init__(self, *event):
        super().__init__(*event)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, t, x, context=None):
        self.calls += 1
        return super().forward(t, x, context)


class Descent(nn.Module):
    """Minus the gradient of a potential, as people write it."""

    def __init__(self, features):
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, t, x, context=None):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return -torch.autograd.grad(self.potential(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("kind", [Counting, Descent])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_what_torch_func_does_not_transform_has_its_trace(kind, gradient):
    field, x = kind(2), points(4, 2)
    flow = cnf.Flow(cnf.Continuous(field, solver=cnf.Solver(gradient=gradient)), cnf.Normal(2))
    flow.double()
    log_prob = flow.log_prob(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x).sum(0), x)
    log_det = torch.linalg.slogdet(jacobian.movedim(1, 0)).logabsdet
    torch.testing.assert_close(
        log_prob, flow.base.log_prob(flow.encode(x)) + log_det, atol=1e-4, rtol=1e-4
    )
    log_prob.sum().backward()
    assert next(field.parameters()).grad.abs().sum() > 0


def test_a_detached_velocity_is_refused_where_torch_func_ends():
    class Detached(Descent):
        def forward(self, t, x, context=None):
            return super().forward(t, x.detach())

    with pytest.raises(ValueError, match="detached copy"), torch.no_grad():
        evaluate(Exact(), Detached(2), points(4, 2))


def test_an_error_of_the_field_is_not_swallowed():
    def field(t, x, context):
        return x @ torch.ones(7, 7, dtype=F64)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(Exact(), field, points(4, 2))


ESTIMATORS = [
    Hutchinson(),
    Hutchinson(3),
    Hutchinson(2, "gaussian"),
    HutchPlusPlus(1, 1),
    HutchPlusPlus(2, 2, "rademacher"),
    HutchPlusPlus(1, 9),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("event", [(4,), (1, 2, 2)], ids=str)
def test_estimates_are_unbiased_with_their_variance(estimator, event):
    # one and the same point many times: the samples are independent estimates of one trace
    field, n = Plain(*event), 40_000
    x = points(*event).expand(n, *event)
    found = evaluate(estimator, field, x)
    expected = traces(field, x[:1])
    assert found.samples.shape == (estimator.estimates, n)
    torch.testing.assert_close(found.samples.mean(0), found.divergence)
    spread = found.divergence.std()
    assert abs(found.divergence.mean() - expected) <= 4 * spread / n**0.5 + 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: field(T, x), x[0]).reshape(4, 4)
    symmetric = (jacobian + jacobian.T) / 2
    if isinstance(estimator, Hutchinson):
        if estimator.noise == "rademacher":
            symmetric = symmetric - symmetric.diagonal().diag()
        variance = 2 * symmetric.square().sum() / estimator.probes
        assert float(spread.detach()) ** 2 == pytest.approx(float(variance.detach()), rel=0.05)
    else:
        assert spread < (2 * symmetric.square().sum() / estimator.probes) ** 0.5
        if estimator.rank >= 4:
            assert spread < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_weighted_probes_make_the_identity(estimator):
    field, n = Plain(4), 40_000
    found = evaluate(estimator, field, points(4).expand(n, 4), products=True)
    weights = torch.as_tensor(found.weights, dtype=F64).expand(len(found.probes))
    mean = torch.einsum("k,kni,knj->ij", weights, found.probes, found.probes) / n
    torch.testing.assert_close(mean, torch.eye(4, dtype=F64), atol=0.06, rtol=0)


def test_hutch_plus_plus_is_exact_on_what_its_basis_spans():
    torch.manual_seed(0)
    left, right = torch.randn(6, 2, dtype=F64), torch.randn(2, 6, dtype=F64)

    def field(t, x, context):
        return x @ (left @ right).T

    found = evaluate(HutchPlusPlus(probes=3, rank=2), field, points(5, 6))
    expected = torch.full((5,), (left @ right).trace(), dtype=F64)
    torch.testing.assert_close(found.samples, expected.expand(3, 5))


@pytest.mark.parametrize("estimator", [Hutchinson(2), HutchPlusPlus(2, 2)], ids=str)
def test_noise_is_the_generators(estimator):
    field, x = Plain(4), points(5, 4)
    first = evaluate(estimator, field, x, seed=1).divergence
    state = torch.get_rng_state()
    assert torch.equal(evaluate(estimator, field, x, seed=1).divergence, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(evaluate(estimator, field, x, seed=2).divergence, first)


@pytest.mark.parametrize("estimator", [Exact(), *ESTIMATORS], ids=str)
def test_an_empty_batch(estimator):
    assert evaluate(estimator, Plain(4), points(0, 4)).divergence.shape == (0,)


@pytest.mark.parametrize("estimator", [Exact(3), *ESTIMATORS], ids=str)
def test_records_come_back(estimator):
    assert decode(encode(estimator)) == estimator
    assert pickle.loads(pickle.dumps(estimator)) == estimator
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimator.chunk = 1


def test_arguments_are_checked():
    for wrong in (lambda: Exact(0), lambda: Hutchinson(0), lambda: HutchPlusPlus(rank=0)):
        with pytest.raises(ValueError, match="positive integer"):
            wrong()
    for kind in (Hutchinson, HutchPlusPlus):
        with pytest.raises(ValueError, match="'rademacher' or 'gaussian', got 'normal'"):
            kind(noise="normal")


class Coupled(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, t, x, context=None):
        return self.mix(x)


COUPLED = {
    "mean": lambda x: x - x.mean(0),
    "batch normalisation": nn.BatchNorm1d(2, dtype=F64),
    "attention": lambda x: torch.softmax(x @ x.T, -1) @ x,
    "neighbour": lambda x: x + torch.roll(x, 1, 0).sin(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_batch_is_refused_by_name(name):
    flow = cnf.Continuous(Coupled(COUPLED[name]))
    with pytest.raises(CoupledBatchError, match=r"velocity of sample \d depends on sample 0"):
        flow.inverse(points(6, 2))
    assert flow.inverse(points(6, 2), None, cnf.Request(log_det=False)).log_det.isnan().all()


@pytest.mark.parametrize("couples", [True, False])
@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (lambda x: x.sum(-1), ValueError, r"shapes of the state, \[\(3, 2\)\], and has \[\(3,\)"),
        (lambda x: x[:1], ValueError, r"has \[\(1, 2\)\]"),
        (lambda x: x.sum(), ValueError, r"has \[\(\)\]"),
        (lambda x: None, TypeError, "returned NoneType"),
        (lambda x: (x,), TypeError, "returned tuple"),
    ],
    ids=["rows", "broadcast", "scalar", "nothing", "tuple"],
)
def test_what_is_no_velocity_is_told(wrong, error, told, couples):
    field = Coupled(wrong)
    field.couples_batch = couples
    for log_det in (True, False):
        with pytest.raises(error, match=told):
            cnf.Continuous(field).inverse(points(3, 2), None, cnf.Request(log_det=log_det))


def test_what_belongs_together_is_one_event():
    field = Coupled(lambda x: x - x.mean(-2, keepdim=True))
    field.event_dims = 2
    mapped = cnf.Continuous(field).inverse(points(5, 6, 2))
    torch.testing.assert_close(mapped.log_det, torch.full((5,), -10.0, dtype=F64))


def test_uncoupled_fields_are_let_through():
    for field in (Plain(2), nn.Sequential()):
        if isinstance(field, nn.Sequential):
            field = Coupled(nn.Sequential(nn.Linear(2, 9), nn.LayerNorm(9), nn.Linear(9, 2)))
            field.double()
        assert cnf.Continuous(field).inverse(points(6, 2)).log_det.isfinite().all()


class TestStandardError:
    """What ``evaluate(...).stderr`` says, against the spread over seeds."""

    def flow(self):
        torch.manual_seed(3)
        flow = cnf.ffjord(3, hidden=(8, 8)).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
        return flow

    @pytest.mark.parametrize("estimator", [Hutchinson(8), HutchPlusPlus(8, 1)], ids=str)
    def test_is_the_spread_over_seeds(self, estimator):
        flow, seeds = self.flow(), 60
        x = points(4, 3).repeat(seeds, 1)  # every copy has probes of its own
        request = cnf.Request(
            divergence=estimator, variance=True, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            found = flow.evaluate(x, request=request)
            exact = flow.log_prob(x[:4])
        log_prob = found.log_prob.reshape(seeds, 4)
        claimed = found.stderr.reshape(seeds, 4).square().mean(0).sqrt()
        torch.testing.assert_close(claimed, log_prob.std(0), rtol=0.35, atol=1e-6)
        assert ((log_prob.mean(0) - exact).abs() < 5 * claimed / seeds**0.5 + 1e-5).all()

    def test_is_zero_where_the_trace_is_exact(self):
        found = self.flow().evaluate(points(4, 3), request=cnf.Request(variance=True))
        assert torch.equal(found.stderr, torch.zeros(4, dtype=F64))

    def test_is_not_there_without_the_trace(self):
        request = cnf.Request(divergence=Hutchinson(2), variance=True, log_det=False)
        _, log_det, costs = self.flow().transform.inverse(points(4, 3), request=request)
        assert log_det.shape == costs["log_det_variance"].shape == (4,)
        assert log_det.isnan().all()

    def test_needs_two_estimates(self):
        request = cnf.Request(divergence=Hutchinson(), variance=True)
        with pytest.raises(ValueError, match=r"needs at least two of them.*Hutchinson\(probes=8\)"):
            self.flow().evaluate(points(4, 3), request=request)


@pytest.mark.parametrize("gradient", ["adjoint", "backprop", "checkpoint"])
def test_hutch_plus_plus_trains_in_every_gradient_mode(gradient):
    solver = cnf.Solver(rtol=1e-9, atol=1e-9, gradient=gradient)
    torch.manual_seed(0)
    flow = cnf.ffjord(3, hidden=(8,), solver=solver).double()
    reference = cnf.ffjord(3, hidden=(8,), solver=dataclasses.replace(solver, gradient="backprop"))
    reference.double().load_state_dict(flow.state_dict())
    grads = []
    for model in (flow, reference):
        request = cnf.Request(HutchPlusPlus(2, 1), generator=torch.Generator().manual_seed(1))
        loss = model.evaluate(points(4, 3), request=request).log_prob.sum()
        grads.append(torch.autograd.grad(loss, list(model.transform.field.parameters())))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
