"""Products in compiled code block by block: torch's numbers, however a matrix lies."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from cnf import compiling, onednn

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
        or not onednn.has_blocks(),
        reason="needs a CPU and a torch with oneDNN's kernels for blocks",
    ),
]


@pytest.fixture(autouse=True)
def paying(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(onednn, "blocks_pay", lambda: True)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
        assert one.stride() == other.stride()


def in_columns(x):
    return x.t().contiguous().t()


def products(x, y, w, b):
    """Whatever comes by rows or by columns, parts of matrices, and rows that are all the same."""
    k = w.shape[0]
    return (
        x @ w,
        in_columns(x) @ w,
        torch.addmm(b, x, w.t().contiguous().t()),
        in_columns(x) @ in_columns(w),
        x.t() @ y / len(x),
        in_columns(x).t() @ in_columns(y) / len(x),
        x[1:, 1:k] @ w[1:, 2:],
        x[:1].expand(x.shape) @ w,
        torch.addmm(y.sin(), x, w),
        w.t() @ x.t(),
        x.t() @ x / len(x),
        x[1:, :k].t() @ x[:-1, 1:] / len(x),
    )


def numbers(rows, inner, columns):
    torch.manual_seed(0)
    w = torch.randn(inner, columns) / inner**0.5
    return torch.randn(rows, inner), torch.randn(rows, columns), w, torch.randn(columns)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("inner", "columns"), [(64, 64), (2, 17), (300, 5), (33, 600)], ids=lambda size: str(size)
)
@torch.no_grad()
def test_numbers_may_lie_as_they_like(inner, columns, native):
    run = compiling.compiled(products, dynamic=True, whole=True, native=native)
    for rows in (3, 64, 700):
        given = numbers(rows, inner, columns)
        close(run(*given), products(*given))


@torch.no_grad()
def test_many_ways_to_lie(monkeypatch):
    from cnf import brgemm

    monkeypatch.setattr(brgemm, "WAYS", 2)
    monkeypatch.setattr(brgemm.Rewriting, "uuid", lambda self: "two ways")
    run = compiling.compiled(products, dynamic=True, native=True)
    for inner, columns in [(64, 64), (300, 70)]:
        for rows in (3, 64, 700, 65, 701):
            given = numbers(rows, inner, columns)
            close(run(*given), products(*given))


def test_code_is_for_all_batches():
    run = compiling.compiled(torch.mm, dynamic=True)
    before = counters["stats"]["unique_graphs"]
    for rows in (3, 64, 700):
        x, _, w, _ = numbers(rows, 8, 9)
        close([run(x, w)], [x @ w])
    assert counters["stats"]["unique_graphs"] == before + 1


@torch.no_grad()
def test_all_products_of_float32_go_there():
    def function(x, y, w, b, doubles):
        return products(x, y, w, b), doubles @ doubles

    run, given = compiling.compiled(function), numbers(8, 5, 6)
    with torch._inductor.config.patch(fx_graph_cache=False):  # which may hold the code
        _, code = run_and_get_code(run, *given, torch.eye(7).double())
    text = "".join(code)
    assert "cpublas::brgemm(" in text
    assert text.count("extern_kernels.") + text.count("aoti_torch_cpu_mm_out(") == 1


@torch.no_grad()
def test_what_has_no_numbers():
    def function(x, w):
        return x @ w, w.t() @ x.t()

    run = compiling.compiled(function)
    for rows, inner, columns in [(4, 0, 3), (0, 4, 3), (1, 1, 1), (5, 1, 1), (1, 3, 4)]:
        x, _, w, _ = numbers(rows, inner, columns)
        close(run(x, w), function(x, w))


@torch.no_grad()
def test_infinite_numbers_and_none_stay():
    x, _, w, _ = numbers(90, 70, 33)
    x[1, 2], x[3, 4], w[5, 6] = torch.nan, torch.inf, -torch.inf
    found, wanted = compiling.compiled(torch.mm)(x, w), x @ w
    torch.testing.assert_close(found, wanted, equal_nan=True, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_threads_share_a_product():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run = compiling.compiled(products)
        with torch._inductor.config.patch(fx_graph_cache=False):
            for rows, inner, columns in [(1000, 40, 40), (40, 40, 1000)]:
                given = numbers(rows, inner, columns)
                close(run(*given), products(*given))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("native", [False, True])
def test_gradients_are_torchs(native):
    def function(x, w, v, b):
        return torch.addmm(b, x, w.t()).tanh() @ v

    run = compiling.compiled(function, dynamic=True, native=native)
    for rows in (5, 600):
        torch.manual_seed(0)
        x, w, v, b = torch.randn(rows, 9), torch.randn(16, 9), torch.randn(16, 4), torch.randn(16)
        given = [tensor.requires_grad_() for tensor in (x, w / 3, v / 4, b)]
        value, wanted = run(*given), function(*given)
        torch.testing.assert_close(value, wanted, atol=2e-5, rtol=2e-5)
        found, expected = (
            torch.autograd.grad(result.sin().sum(), given) for result in (value, wanted)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
