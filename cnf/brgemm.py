"""Products of matrices in code that Inductor makes, by oneDNN's kernels for blocks of them.

Imported where something is compiled only, because Inductor takes a second to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor.lowering  # before the others, which import each other
from torch import Tensor
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.ir import ExternKernel, FixedLayout
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

# Blocks of a product, whose numbers stay in a core's nearest cache, and of what is summed over.
ROWS, COLUMNS, INNER = 64, 256, 128
# multiplications below which other threads are not worth waking
SHARED = 1 << 18
# ways for operands and a result to lie that oneDNN, which forgets none, makes kernels for
WAYS = 64

SOURCE = r"""
#include <array>
#include <set>
#include <xmmintrin.h>

namespace at::native::cpublas {{
void brgemm(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*,
    bool);
}}

extern "C" {definition} {{
  const float* left = &{left};
  const float* right = &{right};
  float* result = &{result};
  const int64_t rows = {rows}, columns = {columns}, inner = {inner};
  constexpr bool left_turned = {left_turned}, right_turned = {right_turned};
  // from one row to the next, or from one column: a single one may be said to end at once
  const int64_t left_step = std::max<int64_t>({left_step}, left_turned ? rows : inner);
  const int64_t right_step = std::max<int64_t>({right_step}, right_turned ? inner : columns);
  if (inner == 0) std::fill_n(result, rows * columns, 0.0f);
  static thread_local std::set<std::array<int64_t, 3>> ways;
  const std::array<int64_t, 3> way{{left_step, right_step, columns}};
  // of more ways than these, copies are multiplied, which lie as others do
  const bool in_place =
      ways.count(way) || (ways.size() < {WAYS} && ways.insert(way).second);
  const bool left_copied = left_turned || !in_place;
  const bool right_wide = 2 * rows >= {ROWS} && right_step > 2 * {COLUMNS};
  const bool right_copied = right_turned || right_wide || !in_place;
  // a little apart from where caches would put all rows in the same place
  constexpr int64_t left_apart = {INNER} + 16, right_apart = {COLUMNS} + 16;
  const int64_t deepest = std::min<int64_t>({INNER}, inner);
  const auto copy = [](const float* from, int64_t step, float* to, int64_t apart, int64_t m,
                       int64_t n) {{
    for (int64_t i = 0; i < m; i++) std::copy_n(from + i * step, n, to + i * apart);
  }};
  // rows become columns, four by four
  const auto turn = [](const float* from, int64_t step, float* to, int64_t apart, int64_t m,
                       int64_t n) {{
    const int64_t tiled_m = m / 4 * 4, tiled_n = n / 4 * 4;
    for (int64_t i = 0; i < tiled_m; i += 4)
      for (int64_t j = 0; j < tiled_n; j += 4) {{
        const float* tile = from + i * step + j;
        float* turned = to + j * apart + i;
        __m128 first = _mm_loadu_ps(tile), second = _mm_loadu_ps(tile + step),
               third = _mm_loadu_ps(tile + 2 * step), fourth = _mm_loadu_ps(tile + 3 * step);
        _MM_TRANSPOSE4_PS(first, second, third, fourth);
        _mm_storeu_ps(turned, first);
        _mm_storeu_ps(turned + apart, second);
        _mm_storeu_ps(turned + 2 * apart, third);
        _mm_storeu_ps(turned + 3 * apart, fourth);
      }}
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = i < tiled_m ? tiled_n : 0; j < n; j++)
        to[j * apart + i] = from[i * step + j];
  }};
  // each of a part's rows and columns is one thread's
  const auto part = [&](int64_t first_row, int64_t row_end, int64_t first, int64_t end) {{
    std::unique_ptr<float[]> lefts(left_copied ? new float[{ROWS} * left_apart] : nullptr);
    std::unique_ptr<float[]> rights(right_copied ? new float[deepest * right_apart] : nullptr);
    std::unique_ptr<float[]> results(in_place ? nullptr : new float[{ROWS} * right_apart]);
    for (int64_t j = first; j < end; j += {COLUMNS}) {{
      const int64_t n = std::min<int64_t>({COLUMNS}, end - j);
      for (int64_t k = 0; k < inner; k += {INNER}) {{
        const int64_t depth = std::min<int64_t>({INNER}, inner - k);
        const float* b = right + (right_turned ? j * right_step + k : k * right_step + j);
        if (right_turned)
          turn(b, right_step, rights.get(), right_apart, n, depth);
        else if (right_copied)
          copy(b, right_step, rights.get(), right_apart, depth, n);
        for (int64_t i = first_row; i < row_end; i += {ROWS}) {{
          const int64_t m = std::min<int64_t>({ROWS}, row_end - i);
          const float* a = left + (left_turned ? k * left_step + i : i * left_step + k);
          float* c = result + i * columns + j;
          if (left_turned)
            turn(a, left_step, lefts.get(), left_apart, depth, m);
          else if (left_copied)
            copy(a, left_step, lefts.get(), left_apart, m, depth);
          if (!in_place && k > 0) copy(c, columns, results.get(), right_apart, m, n);
          at::native::cpublas::brgemm(
              m, n, depth, left_copied ? left_apart : left_step,
              right_copied ? right_apart : right_step, in_place ? columns : right_apart, k > 0,
              left_copied ? lefts.get() : a, right_copied ? rights.get() : b,
              in_place ? c : results.get(), false);
          if (!in_place) copy(results.get(), right_apart, c, columns, m, n);
        }}
      }}
    }}
  }};
  constexpr int64_t threads = {threads};
  if (threads == 1 || rows * columns * inner < {SHARED}) {{
    part(0, rows, 0, columns);
    return;
  }}
  const bool by_rows = rows >= columns;
  const int64_t share = ((by_rows ? rows : columns) + threads - 1) / threads;
#pragma omp parallel for num_threads({threads})
  for (int64_t thread = 0; thread < threads; thread++) {{
    const int64_t begin = thread * share;
    if (by_rows)
      part(std::min(begin, rows), std::min(begin + share, rows), 0, columns);
    else
      part(0, rows, std::min(begin, columns), std::min(begin + share, columns));
  }}
}}
"""


@torch.library.custom_op("cnf::product", mutates_args=())
def product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, which compiled code computes block by block."""
    return left @ right


@product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


class Product(CppTemplate):
    """The code of one product."""

    def __init__(self, left: Any, right: Any):
        size = [left.get_size()[0], right.get_size()[1]]
        layout = FixedLayout(torch.device("cpu"), torch.float32, size)
        super().__init__("product", [left, right], layout, parallel_num_threads())

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: Sequence[Any] | None = None,
    ) -> str:
        """The source; nothing that follows is computed along with it."""
        left, right = self.input_nodes
        result = self.output_node if template_buffer_node is None else template_buffer_node
        definition = kernel.def_kernel({"left_": left, "right_": right}, {"result_": result})
        turned = [_is_turned(operand) for operand in (left, right)]
        body = SOURCE.format(
            definition=definition,
            left=kernel.index(left, [0, 0]),
            right=kernel.index(right, [0, 0]),
            result=kernel.index(result, [0, 0]),
            rows=kernel.size(left, 0),
            columns=kernel.size(right, 1),
            inner=kernel.size(left, 1),
            left_step=kernel.stride(left, 1 if turned[0] else 0),
            right_step=kernel.stride(right, 1 if turned[1] else 0),
            left_turned=str(turned[0]).lower(),
            right_turned=str(turned[1]).lower(),
            threads=self.num_threads,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            INNER=INNER,
            SHARED=SHARED,
            WAYS=WAYS,
        )
        return self.header().getvalue() + body


def _is_turned(operand: Any) -> bool:
    """Whether a matrix lies column by column."""
    return not V.graph.sizevars.statically_known_equals(operand.get_stride()[1], 1)


def _laid_out(operand: Any) -> Any:
    """A matrix in memory, row by row or column by column."""
    operand = ExternKernel.realize_input(operand)
    known = V.graph.sizevars
    for near, far in ((1, 0), (0, 1)):
        size, stride = operand.get_size()[near], operand.get_stride()
        if known.statically_known_equals(stride[near], 1) and known.statically_known_leq(
            size, stride[far]
        ):
            return operand
    return ExternKernel.require_contiguous(operand)


@torch._inductor.lowering.register_lowering(torch.ops.cnf.product.default)
def _lowered(left: Any, right: Any) -> Any:
    found = Product(_laid_out(left), _laid_out(right)).generate().output_node()
    found.data.data.allow_epilogue_fusion = False
    return found


class Rewriting(CustomGraphPass):
    """Products by the code above, wherever a graph has them."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for node in [node for node in graph.nodes if _is_product(node)]:
            *summand, left, right = node.args
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.cnf.product.default, (left, right))
                new.meta = dict(node.meta)
                if summand:
                    new = graph.call_function(torch.ops.aten.add.Tensor, (new, *summand))
                    new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What compiled code is known by on disk."""
        return get_hash_for_files((__file__,))


def _is_product(node: Node) -> bool:
    kinds = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    if node.target not in kinds or node.kwargs:
        return False
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    return all(
        isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"
        for value in values
    )
