"""One pass over a batch's activations: less a row, or their squared distance from it.

Shapes: N tokens, D width. torch has no vectorised kernel for operands of two dtypes, and would make a wide copy.
"""
# pyright: basic

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import interpreting

BLOCK_N, BLOCK_D = 8, 512
"""A program's tile."""


@triton.jit(do_not_specialize=["N"])
def _center_kernel(
    x_ptr, shift_ptr,  # [N, D], [D] float32
    out_ptr,  # [N, D], or None: not asked for
    sums_ptr,  # [programs] float32, each tile's sum of squares; None: not asked for
    N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    shift = tl.load(shift_ptr + offs_d, mask=offs_d < D, other=0.0)
    difference = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - shift[None, :]
    if out_ptr is not None:
        tl.store(out_ptr + offs, difference.to(out_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        squares = tl.where(mask, difference * difference, 0.0)
        tl.store(sums_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(squares, 1), 0))


def center(x: Tensor, shift: Tensor) -> Tensor:  # [N, D], [D] -> [N, D]
    """``x - shift``, subtracted in float32 and rounded once to x's dtype. Not for float64."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.float32 if interpreting() else None)  # whose casts to 16 bits truncate
    _launch(x, shift, out, None)
    return out.to(x.dtype)


def squared_distance(x: Tensor, shift: Tensor) -> Tensor:  # [N, D], [D] -> []
    """``Σ ‖x_n - shift‖²`` in float32, partial sums added in float64. Not for float64."""
    x = x.contiguous()
    sums = x.new_empty(_grid(*x.shape), dtype=torch.float32)
    _launch(x, shift, None, sums)
    return sums.sum(dtype=torch.float64).float()


def _grid(N: int, D: int) -> tuple[int, int]:
    return triton.cdiv(N, BLOCK_N), triton.cdiv(D, BLOCK_D)


def _launch(x: Tensor, shift: Tensor, out: Tensor | None, sums: Tensor | None) -> None:
    if x.numel():
        with torch.cuda.device_of(x):
            _center_kernel[_grid(*x.shape)](
                x, shift.float().contiguous(), out, sums, *x.shape, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4
            )
