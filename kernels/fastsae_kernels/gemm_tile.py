# pyright: basic
"""The scores of one tile of tokens and latents: ``x weightᵀ + bias``, accumulated in float32.

Shapes: N tokens, D width, L latents. Rows past N and L are not masked, so that the loop over D stays free of
predicates: pointers repeat the last row there, descriptors read zeros. Whoever uses the tile drops them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _add_products(
    acc, d, x_ptr, weight_ptr, rows_n, rows_l, begin_n, begin_l, D,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of the columns from ``d``."""
    offs_d = d + tl.arange(0, BLOCK_D)
    if DESCRIPTORS:
        x = x_ptr.load([begin_n, d])
        weight = weight_ptr.load([begin_l, d])
    elif EVEN_D:
        x = tl.load(x_ptr + rows_n[:, None] * D + offs_d[None, :])
        weight = tl.load(weight_ptr + rows_l[:, None] * D + offs_d[None, :])
    else:
        mask_d = (offs_d < D)[None, :]
        x = tl.load(x_ptr + rows_n[:, None] * D + offs_d[None, :], mask=mask_d, other=0.0)
        weight = tl.load(weight_ptr + rows_l[:, None] * D + offs_d[None, :], mask=mask_d, other=0.0)
    if INTERPRETED:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, weight.T, acc, input_precision=PRECISION)


@triton.jit
def tile_scores(
    x_ptr, weight_ptr, bias_ptr, begin_n, begin_l, N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Float32 [BLOCK_N, BLOCK_L] scores of the tokens from ``begin_n`` and the latents from ``begin_l``."""
    rows_n = tl.minimum(begin_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    rows_l = tl.minimum(begin_l + tl.arange(0, BLOCK_L), L - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_L), dtype=tl.float32)
    if INTERPRETED:
        d = tl.full((), 0, tl.int32)
        while d < D:
            acc = _add_products(
                acc, d, x_ptr, weight_ptr, rows_n, rows_l, begin_n, begin_l, D,
                BLOCK_D, EVEN_D, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
            d += BLOCK_D
    else:
        for d in range(0, D, BLOCK_D):
            acc = _add_products(
                acc, d, x_ptr, weight_ptr, rows_n, rows_l, begin_n, begin_l, D,
                BLOCK_D, EVEN_D, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
    return acc + tl.load(bias_ptr + rows_l)[None, :]


def tile_operands(x: Tensor, weight: Tensor, BLOCK_N: int, BLOCK_L: int, BLOCK_D: int):
    """Descriptors of ``x`` and ``weight`` to pass as ``x_ptr, weight_ptr``, or None where rows miss 16 bytes."""
    if x.shape[1] * x.element_size() % 16 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    return (
        TensorDescriptor.from_tensor(x, [BLOCK_N, BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [BLOCK_L, BLOCK_D]),
    )
