"""Products of matrices by oneDNN, on CPUs that MKL has no code of its own for.

PyTorch multiplies on x86 by MKL, whose code for other makers' processors uses vectors of 256 bits
where they have 512. oneDNN, which PyTorch has, too, goes by what a processor can do; it takes
longer to start than a small product takes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from cnf.arrays import fits_arrays

# A product's work is its numbers times the multiplications in one, and as many more as storing one
# takes as long as; from here on oneDNN is faster (`python -m benchmarks products`).
LARGE = 3 << 19
AROUND = 32
# between other operations that Python starts, oneDNN comes to its own later
LARGE_ALONE = 2 * LARGE


@functools.cache
def pays() -> bool:
    """Whether MKL makes less of this processor than oneDNN does."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # what MKL itself goes by; a library that is loaded before torch may answer in its place
        return not ctypes.CDLL(str(library)).mkl_serv_intel_cpu_true()
    except (OSError, AttributeError):
        return False


def product(left: Tensor, right: Tensor, summand: Tensor | None = None) -> Tensor:
    """The product of two matrices, the fast way where no gradient is wanted.

    Args:
        left: ``(rows, inner)``.
        right: ``(inner, columns)``.
        summand: what is added, ``(columns,)`` or ``(rows, columns)``.

    Returns:
        ``(rows, columns)``.

    Example:
        >>> product(torch.ones(3, 2), torch.ones(2, 4)).shape
        torch.Size([3, 4])
    """
    # compilers see products alone, or else their code would be for sizes as large as the first
    large = not torch.compiler.is_compiling() and pays() and work(left, right) >= LARGE_ALONE
    exact = left.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if large and exact and fits_arrays(left, right):
        result = by_onednn(left, right)
        return result if summand is None else result.add_(summand)
    return torch.mm(left, right) if summand is None else torch.addmm(summand, left, right)


def work(left: Tensor, right: Tensor) -> int:
    """How much there is to do for a product of two matrices."""
    rows, inner = left.shape
    return rows * right.shape[1] * (inner + AROUND)


def by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices by oneDNN; no gradient passes."""
    # a linear layer, whose weight is the other way round and may lie as it likes
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


@functools.cache
def rewriting() -> Callable[[Graph], None] | None:
    """What makes oneDNN's of the large products in a graph that Inductor compiles.

    None for a torch in which it is not known how.
    """
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass  # takes a second to import
        from torch._inductor.mkldnn_ir import LinearUnary
    except ImportError:
        return None
    from torch._inductor.ir import ExternKernel, FixedLayout, TensorBox
    from torch._inductor.lowering import permute, register_lowering

    operation = torch.library.custom_op("cnf::product", by_onednn, mutates_args=())
    operation.register_fake(lambda left, right: left.new_empty(left.shape[0], right.shape[1]))
    overload = torch.ops.cnf.product.default

    @register_lowering(overload)
    def lowered(left: Any, right: Any) -> Any:
        # torch's own is for weights that are constants only
        x, weight = map(ExternKernel.realize_input, (left, permute(right, [1, 0])))
        x, weight = map(ExternKernel.require_stride1, (x, weight))
        size = [x.get_size()[0], weight.get_size()[0]]
        layout = FixedLayout(torch.device("cpu"), torch.float32, size)
        return TensorBox.create(LinearUnary(layout, [x, weight], [None, "none", [-1], ""]))

    class Rewriting(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            rewrite(graph, overload)

        def uuid(self) -> tuple[str, int, int]:
            return "cnf.onednn 1", LARGE, AROUND

    return Rewriting()


def rewrite(graph: Graph, operation: Any) -> None:
    """Put an operation in the place of a graph's products, if the largest is large."""
    found = [node for node in graph.nodes if _is_product(node)]
    works = [work(*_operands(node)) for node in found]
    # one question for all, because each new answer compiles the graph again
    largest = max(works, key=_known, default=0)
    if not _known(largest) or not largest >= LARGE:
        return
    for node, size in zip(found, works, strict=True):
        if _known(size) >= LARGE:
            _replace(graph, node, operation)


def _is_product(node: Node) -> bool:
    kinds = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    if node.target not in kinds or node.kwargs:
        return False
    value = node.meta["val"]
    return value.dtype == torch.float32 and value.device.type == "cpu"


def _operands(node: Node) -> list[Tensor]:
    return [operand.meta["val"] for operand in node.args[-2:]]  # type: ignore[union-attr]


def _known(size: Any) -> int:
    """A number, or what one that may vary is at the moment; 0 where that is not known."""
    return size if isinstance(size, int) else size.node.hint or 0


def _replace(graph: Graph, node: Node, operation: Any) -> None:
    *summand, left, right = node.args
    with graph.inserting_before(node):
        new = graph.call_function(operation, (left, right))
        new.meta = dict(node.meta)
        if summand:
            new = graph.call_function(torch.ops.aten.add.Tensor, (new, *summand))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
