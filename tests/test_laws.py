"""The laws that every transform and every model obeys, whatever it is made of."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.transforms import Mapped
from tests.registry import MODELS, SINGLE, TIGHT, TRANSFORMS, Member

F32, F64 = torch.float32, torch.float64


def make(
    member: Member,
    dtype: torch.dtype = F64,
    spread: float | None = None,
    solver: cnf.Solver | None = None,
) -> nn.Module:
    """Build a member and move its parameters away from where they start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = member.build(solver or (TIGHT if dtype == F64 else SINGLE))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += (member.spread if spread is None else spread) * torch.randn_like(
                    parameter
                )
    return module.to(dtype)


def points(
    member: Member, *batch: int, dtype: torch.dtype = F64, seed: int = 1, latent: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    event = (member.latent or member.event) if latent else member.event
    drawn = torch.randn(*batch, *event, generator=generator, dtype=F64)
    if member.window is not None:
        low, high = member.window
        drawn = low + (high - low) * torch.sigmoid(drawn)
    return drawn.to(dtype)


def contexts(member: Member, *batch: int, dtype: torch.dtype = F64) -> Tensor | None:
    if not member.context:
        return None
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*batch, member.context, generator=generator, dtype=F64).to(dtype)


def both(cases: list[Member]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("member", cases, ids=str)


BATCHES = [(), (5,), (2, 3), (0,), (3, 0)]


@both(TRANSFORMS)
class TestTransforms:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_inverse_undoes_forward(self, member, batch, dtype):
        transform, z = make(member, dtype), points(member, *batch, dtype=dtype, latent=True)
        context = contexts(member, *batch, dtype=dtype)
        with torch.no_grad():
            there = transform(z, context)
            back = transform.inverse(there.value, context)
        assert there.value.shape == (*batch, *member.event)
        assert transform.latent_shape(member.event) == (member.latent or member.event)
        assert transform.data_shape(member.latent or member.event) == member.event
        assert there.log_det.shape == batch
        assert there.value.dtype == there.log_det.dtype == back.value.dtype == dtype
        tolerance = member.tolerance if dtype == F64 else member.tolerance32
        torch.testing.assert_close(back.value, z, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            back.log_det, -there.log_det, atol=10 * tolerance, rtol=tolerance
        )

    @pytest.mark.parametrize("direction", ["forward", "inverse"])
    def test_log_det_is_the_jacobians(self, member, direction):
        transform, context = make(member), contexts(member)
        z = points(member, latent=direction == "forward")
        apply = getattr(transform, direction)
        jacobian = torch.autograd.functional.jacobian(lambda z: apply(z, context).value, z)
        size = math.prod(member.event)
        expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        torch.testing.assert_close(apply(z, context).log_det, expected, atol=1e-7, rtol=1e-7)

    def test_samples_do_not_see_each_other(self, member):
        transform, z = make(member), points(member, 4, latent=True)
        context = contexts(member, 4)
        together = transform(z, context)
        alone = transform(z[1], None if context is None else context[1])
        torch.testing.assert_close(together.value[1], alone.value, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(together.log_det[1], alone.log_det, atol=1e-8, rtol=1e-8)

    def test_copies_agree(self, member):
        transform, context = make(member), contexts(member, 3)
        z = points(member, 3, latent=True)
        expected = transform(z, context).value
        for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
            assert torch.equal(twin(z, context).value, expected)
        assert repr(transform) == repr(copy.deepcopy(transform))

    def test_result_is_the_record(self, member):
        transform = make(member)
        mapped = transform(points(member, 2, latent=True), contexts(member, 2))
        assert isinstance(mapped, Mapped)
        assert mapped.costs == {}
        assert isinstance(transform.bijective, bool)
        assert isinstance(transform.exact, bool)


@both(MODELS)
class TestModels:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_shapes_and_round_trip(self, member, batch, dtype):
        flow, x = make(member, dtype), points(member, *batch, dtype=dtype)
        context = contexts(member, *batch, dtype=dtype)
        with torch.no_grad():
            log_prob = flow.log_prob(x, context)
            back = flow.decode(flow.encode(x, context), context)
        assert log_prob.shape == batch
        assert log_prob.dtype == dtype
        assert torch.isfinite(log_prob).all()
        tolerance = member.tolerance if dtype == F64 else member.tolerance32
        torch.testing.assert_close(back, x, atol=tolerance, rtol=tolerance)

    def test_log_prob_is_repeatable_in_either_mode(self, member):
        flow, x, context = make(member), points(member, 5), contexts(member, 5)
        first = flow.train().log_prob(x, context)
        assert torch.equal(flow.train().log_prob(x, context), first)
        assert torch.equal(flow.eval().log_prob(x, context), first)

    def test_samples_have_their_density(self, member):
        flow = make(member)
        context = contexts(member, 4)
        shape = (3, 4) if member.context else (3,)
        generator = torch.Generator().manual_seed(3)
        x, log_prob = flow.sample_and_log_prob(
            (3,), context, request=cnf.Request(generator=generator)
        )
        assert x.shape == (*shape, *member.event)
        torch.testing.assert_close(flow.log_prob(x, context), log_prob, atol=1e-7, rtol=1e-7)
        again = flow.sample((3,), context, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(again, x, atol=1e-7, rtol=1e-7)
        assert not again.requires_grad

    def test_density_integrates_to_one(self, member):
        if math.prod(member.event) > 2:
            pytest.skip("a grid is for one and two dimensions")
        flow, context = make(member, spread=min(0.1, member.spread)), contexts(member)
        # the grid is laid around the density by its own samples
        draws = flow.sample((4000,), context, generator=torch.Generator().manual_seed(0))
        loc, scale = draws.mean(0), draws.std(0)
        count = 2001 if member.event == (1,) else 301
        axis = torch.linspace(-10, 10, count, dtype=F64)
        if member.window is not None:
            low, high = member.window
            loc, scale = torch.full_like(loc, low), torch.full_like(scale, high - low)
            axis = (torch.arange(count, dtype=F64) + 0.5) / count
        grid = loc + scale * torch.cartesian_prod(*[axis] * member.event[0]).reshape(
            -1, *member.event
        )
        with torch.no_grad():
            density = flow.log_prob(grid, context, chunk=20_000).exp()
        cell = float((scale * (axis[1] - axis[0])).prod())
        assert abs(float(density.sum()) * cell - 1) < 1e-3

    def test_gradients_match_finite_differences(self, member):
        flow, x, context = make(member), points(member, 4), contexts(member, 4)
        tensors = {"x": x, **dict(flow.named_parameters())}
        if context is not None:
            tensors["context"] = context
        for tensor in tensors.values():
            tensor.requires_grad_()
        generator = torch.Generator().manual_seed(5)
        names = list(tensors)
        gradients = torch.autograd.grad(
            flow.log_prob(x, context).sum(), list(tensors.values()), allow_unused=True
        )
        directions = [
            torch.randn(t.shape, generator=generator, dtype=F64) for t in tensors.values()
        ]
        for group in ("x", "context", "parameters"):
            chosen = [
                i
                for i, name in enumerate(names)
                if (name if name in ("x", "context") else "parameters") == group
            ]
            if not chosen:
                continue
            slope = sum(
                float((gradients[i] * directions[i]).sum())
                for i in chosen
                if gradients[i] is not None
            )
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    for i in chosen:
                        tensors[names[i]] += step * directions[i]
                    values.append(float(flow.log_prob(x, context).sum()))
                    for i in chosen:
                        tensors[names[i]] -= step * directions[i]
            numeric = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-6), group
            assert slope != 0

    def test_saved_flow_is_the_same_to_the_bit(self, member, tmp_path):
        for dtype in (F32, F64):
            flow = make(member, dtype)
            x, context = points(member, 5, dtype=dtype), contexts(member, 5, dtype=dtype)
            flow.standardize(x, context)
            expected = flow.log_prob(x, context)
            flow.save(tmp_path / str(dtype))
            state = torch.get_rng_state()
            loaded = cnf.load(tmp_path / str(dtype))
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(loaded.log_prob(x, context), expected)
            assert repr(loaded) == repr(flow)
            into = cnf.load(tmp_path / str(dtype), into=make(member, dtype))
            assert torch.equal(into.log_prob(x, context), expected)

    def test_copies_agree(self, member):
        flow, x, context = make(member), points(member, 5), contexts(member, 5)
        expected = flow.log_prob(x, context)
        for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert torch.equal(twin.log_prob(x, context), expected)

    def test_densities_are_in_the_datas_units(self, member):
        flow = make(member)
        x, context = points(member, 50), contexts(member, 50)
        x = 7 + 3 * x
        before = flow.log_prob((x - x.mean(0)) / x.std(0, correction=0), context)
        flow.scaling.fit(x)
        shift = x.std(0, correction=0).log().sum()
        torch.testing.assert_close(flow.log_prob(x, context), before - shift, atol=1e-7, rtol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both(MODELS)
def test_gpu_agrees_with_cpu(member):
    flow, x, context = make(member), points(member, 7), contexts(member, 7)
    expected = flow.log_prob(x, context)
    flow.cuda()
    moved = flow.log_prob(x.cuda(), None if context is None else context.cuda())
    torch.testing.assert_close(moved.cpu(), expected, atol=1e-8, rtol=1e-8)
    assert flow.sample((3,), None if context is None else context.cuda()).device.type == "cuda"
