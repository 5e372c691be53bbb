"""Continuous flows as users compile them, by Inductor at the default method, obey the laws.

Every way is one piece of code here, and none is walked step by step. The reference is the plain
path: at the same tolerance, whose steps are the same, and at one that stands for the exact flow.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import Tensor

import cnf
from cnf import onednn
from cnf.divergence import Divergence
from cnf.ode import Solver, compiled, stepper
from cnf.ode.compiled import CompiledSteps
from tests.registry import TIGHT, Member
from tests.test_laws import F32, F64, contexts, make, points

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

# a trace of one product, the same with a context, and a trilinear form of three layers
TWO = Member("ffjord", lambda solver: cnf.ffjord(2, hidden=(16, 16), solver=solver), (2,))
SEEING = Member(
    "ffjord with context",
    lambda solver: cnf.ffjord(2, hidden=(16, 16), context_features=1, solver=solver),
    (2,),
    context=1,
)
THREE = Member("ffjord, D=5", lambda solver: cnf.ffjord(5, hidden=(8, 8, 8), solver=solver), (5,))

# rtol and atol as users have them, and as close as a dtype allows
DEFAULT, CLOSE = 1e-6, {F32: 1e-6, F64: 1e-9}
# from the plain path at the same tolerance, and from the exact flow at any
ALIKE = {F32: 3e-6, F64: 1e-11}
NEAR = {F32: 1e-5, F64: 2e-6}
# the same of gradients, and of slopes by finite differences
GRADIENTS_ALIKE = {F32: 1e-5, F64: 1e-9}
SLOPES = {F32: 1e-4, F64: 1e-6}
ROWS = 40

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


@pytest.fixture(scope="module", autouse=True)
def code_of_its_own():
    """With products by blocks wherever the processor and torch have them."""
    torch.compiler.reset()
    compiled.code.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and onednn.has_blocks():
            patch.setattr(onednn, "blocks_pay", lambda: True)
        yield
    compiled.code.cache_clear()


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """The ways of compiled flows; one that is not one piece of code, or is walked, fails."""
    taken: list[str] = []

    def listen(kind):
        function = getattr(CompiledSteps, kind)

        def listening(self, *arguments):
            taken.append(kind)
            found = function(self, *arguments)
            assert found is not None
            return found

        monkeypatch.setattr(CompiledSteps, kind, listening)

    def watch(kind):
        function = getattr(stepper, kind)

        def watching(*arguments):
            solver, *_ = (argument for argument in arguments if isinstance(argument, Solver))
            assert not solver.compile
            return function(*arguments)

        monkeypatch.setattr(stepper, kind, watching)

    listen("arrive")
    listen("retrace")
    watch("walk")
    watch("walk_back")
    return taken


def mine_and_plain(
    member: Member, dtype: torch.dtype, tolerance: float = DEFAULT, **options
) -> list[cnf.Flow]:
    """The same flow compiled and not."""
    solver = functools.partial(Solver, rtol=tolerance, atol=tolerance, **options)
    return [make(member, dtype, solver=solver(compile=compile)) for compile in (True, False)]


def exactly(member: Member) -> cnf.Flow:
    return make(member, F64, solver=TIGHT)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, beside the largest number."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


@torch.no_grad()
@both_dtypes
def test_inverse_undoes_forward(dtype, ways):
    (mine, plain), z = mine_and_plain(TWO, dtype), points(TWO, ROWS, dtype=dtype)
    there = mine.transform(z)
    back = mine.transform.inverse(there.value)
    assert ways == ["arrive", "arrive"]
    assert there.value.dtype == there.log_det.dtype == dtype
    assert apart(back.value, z) < NEAR[dtype]
    assert apart(back.log_det, -there.log_det) < NEAR[dtype]
    wanted = plain.transform(z)
    assert apart(there.value, wanted.value) < ALIKE[dtype]
    assert apart(there.log_det, wanted.log_det) < ALIKE[dtype]


@torch.no_grad()
def test_encode_undoes_decode(ways):
    (mine, plain), z = mine_and_plain(TWO, F32), points(TWO, ROWS, dtype=F32)
    x = mine.decode(z)
    assert apart(x, plain.decode(z)) < ALIKE[F32]
    assert apart(mine.encode(x), z) < NEAR[F32]
    assert ways == ["arrive", "arrive"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("member", "dtype", "tolerance"),
    [(TWO, F32, DEFAULT), (TWO, F64, DEFAULT), (TWO, F64, CLOSE[F64]), (THREE, F32, DEFAULT)],
    ids=str,
)
def test_log_prob_is_the_plain_paths(member, dtype, tolerance, ways):
    x, found, steps = points(member, ROWS, dtype=dtype), [], []
    for flow in mine_and_plain(member, dtype, tolerance):
        with cnf.count_nfe() as nfe:
            found.append(flow.log_prob(x))
        steps.append((nfe.accepted, nfe.rejected))
    assert ways == ["arrive"]
    assert steps[0] == steps[1] or dtype == F32  # whose rounding may tell whether a step is good
    assert apart(*found) < ALIKE[dtype]
    bound = NEAR[dtype] * tolerance / DEFAULT
    assert apart(found[0], exactly(member).log_prob(x.double())) < bound


@pytest.mark.parametrize(("member", "dtype"), [(TWO, F32), (TWO, F64), (THREE, F32)], ids=str)
def test_log_det_is_the_jacobians(member, dtype):
    x, exact = points(member, 12), exactly(member).transform
    # of each sample, which does not see the others
    jacobian = torch.autograd.functional.jacobian(lambda x: exact.inverse(x).value.sum(0), x)
    wanted = torch.linalg.slogdet(jacobian.movedim(1, 0)).logabsdet
    mine, _ = mine_and_plain(member, dtype, CLOSE[dtype])
    with torch.no_grad():
        found = mine.transform.inverse(x.to(dtype)).log_det
    assert apart(found, wanted) < NEAR[dtype] * CLOSE[dtype] / DEFAULT


@torch.no_grad()
@both_dtypes
def test_density_integrates_to_one(dtype):
    mine, plain = mine_and_plain(TWO, dtype)
    # the grid is laid around the density by samples
    draws = plain.sample((4000,), generator=torch.Generator().manual_seed(0)).double()
    loc, scale = draws.mean(0), draws.std(0)
    axis = torch.linspace(-7, 7, 121, dtype=F64)
    density = mine.log_prob((loc + scale * torch.cartesian_prod(axis, axis)).to(dtype)).exp()
    cell = float((scale * (axis[1] - axis[0])).prod())
    assert abs(float(density.double().sum()) * cell - 1) < 1e-6


@torch.no_grad()
@both_dtypes
def test_a_saved_flow_is_the_same_to_the_bit(dtype, tmp_path):
    (flow, _), x = mine_and_plain(TWO, dtype), 3 + 2 * points(TWO, ROWS, dtype=dtype)
    expected = flow.standardize(x).log_prob(x)
    flow.save(tmp_path)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for loaded in (cnf.load(tmp_path), cnf.load(tmp_path, into=mine_and_plain(TWO, dtype)[0])):
            assert loaded.transform.solver.compile is True
            assert torch.equal(loaded.log_prob(x), expected)


@torch.no_grad()
@both_dtypes
def test_batches_of_any_size_take_one_code(dtype, ways):
    (mine, plain), many = mine_and_plain(TWO, dtype), points(TWO, 3000, dtype=dtype)
    mine.log_prob(many[:ROWS])
    batches = [many[:rows] for rows in (2, 3, 16, 700, 3000)]  # the last in groups
    batches += [many[:70:7], many[:50].t().contiguous().t(), many[:1].expand(ROWS, 2), many[:0]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in batches:
            torch.testing.assert_close(
                mine.log_prob(x), plain.log_prob(x), atol=10 * ALIKE[dtype], rtol=10 * ALIKE[dtype]
            )
    assert ways == 11 * ["arrive"]


def loss_of(flow: cnf.Flow, divergence: Divergence, x: Tensor, context: Tensor | None) -> Tensor:
    objective = cnf.MaximumLikelihood(flow, divergence=divergence, tolerance=None)
    return objective(cnf.Batch(x, context), generator=torch.Generator().manual_seed(5)).total


def trained(member: Member, flow: cnf.Flow, divergence: Divergence, rows: int) -> dict[str, Tensor]:
    """The loss and its gradients, by name."""
    x, context = points(member, rows, dtype=flow.dtype), contexts(member, rows, dtype=flow.dtype)
    leaves = {"x": x, "context": context, **dict(flow.named_parameters())}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    loss = loss_of(flow, divergence, x, context)
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@torch.no_grad()
def slopes(
    member: Member, divergence: Divergence, size: float = 1e-5
) -> list[tuple[dict[str, Tensor], float]]:
    """How the loss changes along directions of the points, the contexts and the parameters."""
    flow, x, context = exactly(member), points(member, ROWS), contexts(member, ROWS)
    groups = [{"x": x}, {"context": context} if context is not None else {}]
    groups.append(dict(flow.named_parameters()))
    generator, found = torch.Generator().manual_seed(6), []
    for group in filter(None, groups):
        along = {
            name: torch.randn(tensor.shape, generator=generator, dtype=F64)
            for name, tensor in group.items()
        }
        values = []
        for step in (size, -2 * size):
            for name, tensor in group.items():
                tensor += step * along[name]
            values.append(float(loss_of(flow, divergence, x, context)))
        for name, tensor in group.items():
            tensor += size * along[name]
        found.append((along, (values[0] - values[1]) / (2 * size)))
    return found


@pytest.mark.parametrize(
    ("member", "dtype", "gradient", "norm", "divergence"),
    [
        (TWO, F32, "adjoint", "sample", cnf.Exact()),
        (TWO, F32, "checkpoint", "batch", cnf.Hutchinson()),
        (SEEING, F64, "checkpoint", "batch", cnf.Exact()),
        (SEEING, F64, "adjoint", "batch", cnf.Hutchinson()),
    ],
    ids=str,
)
def test_gradients_are_the_plain_paths(member, dtype, gradient, norm, divergence, ways):
    def both(tolerance: float, rows: int) -> list[dict[str, Tensor]]:
        flows = mine_and_plain(member, dtype, tolerance, gradient=gradient, norm=norm)
        return [trained(member, flow, divergence, rows) for flow in flows]

    mine, plain = both(CLOSE[dtype], ROWS)
    pairs = [(mine, plain)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        pairs += [both(1e-3, 3), both(1e-3, 700)]
    assert ways == 3 * ["arrive", "retrace" if gradient == "checkpoint" else "arrive"]
    for found, wanted in pairs:
        for name, tensor in wanted.items():
            assert apart(found[name], tensor) < GRADIENTS_ALIKE[dtype], name
    for along, slope in slopes(member, divergence):
        found = sum(float((mine[name].double() * toward).sum()) for name, toward in along.items())
        assert found == pytest.approx(slope, rel=SLOPES[dtype])
