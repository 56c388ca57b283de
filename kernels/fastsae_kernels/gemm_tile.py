# pyright: basic
"""The scores of one tile of tokens and latents: ``x weightᵀ + bias``, accumulated in float32.

Shapes: N tokens, D width, L latents. Rows past N and L repeat the last one instead of being masked, so that the
loop over D stays free of predicates; whoever uses the tile drops them.
"""

import triton
import triton.language as tl


@triton.jit
def tile_scores(
    x_ptr, weight_ptr, bias_ptr, offs_n, offs_l, N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Float32 [BLOCK_N, BLOCK_L] scores of tokens ``offs_n`` and latents ``offs_l``."""
    offs_d = tl.arange(0, BLOCK_D)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    rows_l = tl.minimum(offs_l, L - 1).to(tl.int64)
    x_ptrs = x_ptr + rows_n[:, None] * D + offs_d[None, :]
    weight_ptrs = weight_ptr + rows_l[None, :] * D + offs_d[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_L), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_d[None, :] < D - d, other=0.0)
            weight = tl.load(weight_ptrs, mask=offs_d[:, None] < D - d, other=0.0)
        if UPCAST:  # the interpreter's arithmetic on bfloat16 is wrong
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return acc + tl.load(bias_ptr + rows_l)[None, :]
