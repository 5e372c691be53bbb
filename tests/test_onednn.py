"""Products by oneDNN: MKL's numbers, where they are asked for, and nowhere else."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch.autograd import forward_ad

from cnf import compiling, onednn
from cnf.nets import TimeMLP
from cnf.nets.tangents import fused, plain
from cnf.onednn import product

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
ROWS, WIDTH = 600, 64


@pytest.fixture
def taken(monkeypatch):
    """The shapes that go to oneDNN, on a CPU for which that pays."""
    shapes, by_onednn = [], onednn.by_onednn

    def watching(left, right):
        shapes.append((*left.shape, right.shape[1]))
        return by_onednn(left, right)

    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr(onednn, "by_onednn", watching)
    return shapes


def matrices():
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)


VIEWS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "apart": lambda x: x.repeat(2, 2)[::2, ::2],
    "within": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 0))[1:, 3:-5],
    "all alike": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("left", VIEWS)
@pytest.mark.parametrize("right", VIEWS)
@pytest.mark.parametrize("summand", [None, 1, 2])
@torch.no_grad()
def test_numbers_may_lie_as_they_like(left, right, summand, taken):
    x, y = matrices()
    x, y = VIEWS[left](x), VIEWS[right](y)
    more = None if summand is None else torch.randn(ROWS, WIDTH)[0 if summand == 1 else slice(None)]
    wanted = x.double() @ y.double() + (0 if more is None else more)
    torch.testing.assert_close(product(x, y, more), wanted.float(), atol=1e-4, rtol=1e-5)
    assert taken == [(ROWS, WIDTH, WIDTH)]


def test_where_there_is_more_to_a_product_it_is_torchs(taken):
    x, y = matrices()
    tangent = torch.ones_like(x)
    assert torch.autograd.grad(product(x.requires_grad_(), y).sum(), x)[0].shape == x.shape
    x = x.detach()
    with torch.no_grad():
        _, moved = torch.func.jvp(lambda x: product(x, y), (x,), (tangent,))
        torch.testing.assert_close(moved, tangent @ y)
        with forward_ad.dual_level():
            dual = product(forward_ad.make_dual(x, tangent), y)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent @ y)
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x, y).dtype == torch.bfloat16
        assert product(x.double(), y.double()).dtype == torch.float64
        product(x[:100], y)
    assert not taken


@pytest.mark.parametrize("probes", [None, 2])
def test_a_network_with_tangents_has_the_same_gradients(probes, taken):
    torch.manual_seed(0)
    features = 8
    sizes = [(WIDTH, features), (WIDTH, WIDTH), (features, WIDTH)]
    x = torch.randn(ROWS, features, requires_grad=True)
    weights = [(torch.randn(size) / size[1] ** 0.5).requires_grad_() for size in sizes]
    shifts = [torch.randn(size[0], requires_grad=True) for size in sizes]
    tangents = None if probes is None else torch.randn(probes, ROWS, features)
    found = []
    for network in (fused, plain):
        value, products = network("tanh", x, tangents, weights, shifts)
        loss = value.square().mean() + products.square().mean()
        found.append([value, products, *torch.autograd.grad(loss, [x, *weights, *shifts])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(taken) >= 3


@torch.no_grad()
def test_a_trace_goes_there(taken):
    torch.manual_seed(0)
    field, x = TimeMLP(16, (24, 24, 24)), torch.randn(ROWS, 16)
    time = torch.tensor(0.3)
    _, traces = field.trace(time, x, None)
    assert taken == [(ROWS, 24, 24 * 24)]
    _, wanted = field.double().trace(time.double(), x.double(), None)
    torch.testing.assert_close(traces, wanted.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not onednn.has_blocks(), reason="no such kernels in this torch")
def test_what_others_do_to_graphs_stays(monkeypatch):
    def mine(graph):
        return None

    monkeypatch.setattr(onednn, "blocks_pay", lambda: True)
    assert compiling._rewriting() is not None
    with torch._inductor.config.patch(post_grad_custom_post_pass=mine):
        assert compiling._rewriting() is mine
    monkeypatch.setattr(onednn, "blocks_pay", lambda: False)
    assert compiling._rewriting() is None


@pytest.fixture
def asked():
    onednn._is_foreign.cache_clear()
    yield
    onednn._is_foreign.cache_clear()


@pytest.mark.parametrize(
    ("capability", "intels", "told", "called", "compiled"),
    [
        ("AVX512", 0, None, True, True),
        ("AVX512", 0, 0, True, True),
        ("AVX512", 0, 1, False, False),
        ("AVX512", 1, None, False, False),
        ("AVX512", None, None, False, False),
        ("AVX2", 0, None, False, True),
        ("AVX2", 1, None, False, False),
        ("DEFAULT", 0, None, False, False),
    ],
)
def test_it_pays_where_mkl_takes_a_processor_for_another_makers(
    capability, intels, told, called, compiled, asked, monkeypatch
):
    class Library:
        def __init__(self, path):
            answer = told if path is None else intels
            if answer is not None:
                self.mkl_serv_intel_cpu_true = lambda: answer

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(onednn, "has_blocks", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (onednn.pays(), onednn.blocks_pay()) == (called, compiled)
    monkeypatch.setattr(onednn, "has_blocks", lambda: False)
    assert not onednn.blocks_pay()
