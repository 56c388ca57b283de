# pyright: basic
"""GroupMax: the largest activation of each of K contiguous groups of L / K latents.

Shapes: N tokens, D width, L latents, K groups. Equal activations: the smaller index; NaN comes first. A group
without a positive activation yields 0 at its smallest index. `_groupmax_encode_kernel` computes a group's scores
tile by tile and keeps a running maximum in registers, so that nothing of size L is ever written;
`_groupmax_select_kernel` reads stored scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, gpu
from .gemm_tile import tile_scores
from .keys import key_value, relu_key

_BIG = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _better_of(best_key, best_column, keys, columns, AXIS: tl.constexpr):
    """Running maximum over tiles in ascending order of columns; inside a tile the smallest column among the largest."""
    tile_key = tl.max(keys, axis=AXIS)
    tile_column = tl.min(tl.where(keys == tl.expand_dims(tile_key, AXIS), columns, _BIG), axis=AXIS)
    better = tile_key > best_key
    return tl.maximum(best_key, tile_key), tl.where(better, tile_column, best_column)


@triton.jit(do_not_specialize=["N"])
def _groupmax_encode_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, acts_ptr, indices_ptr,
    N, D, L, GROUP_SIZE,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per (block of tokens, group), tokens fastest so that a group's weights stay in L2."""
    pid_n = tl.program_id(0)
    group = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    best_key = tl.full((BLOCK_N,), -1, tl.int32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)
    begin = group * GROUP_SIZE
    end = begin + GROUP_SIZE
    while begin < end:
        offs_l = begin + tl.arange(0, BLOCK_L)
        scores = tile_scores(
            x_ptr, weight_ptr, bias_ptr, pid_n * BLOCK_N, begin, N, D, L,
            BLOCK_N, BLOCK_L, BLOCK_D, EVEN_D, False, PRECISION, INTERPRETED,
        )  # fmt: skip
        keys = relu_key(scores)
        if HAS_MASK:
            kept = tl.load(mask_ptr + offs_l, mask=offs_l < end, other=0) != 0
            keys = tl.where(kept[None, :], keys, 0)
        keys = tl.where((offs_l < end)[None, :], keys, -1)
        best_key, best_column = _better_of(best_key, best_column, keys, offs_l[None, :], 1)
        begin += BLOCK_L
    offs = offs_n.to(tl.int64) * K + group
    tl.store(acts_ptr + offs, key_value(best_key), mask=offs_n < N)
    tl.store(indices_ptr + offs, best_column.to(tl.int64), mask=offs_n < N)


@triton.jit
def _groupmax_select_kernel(
    scores_ptr, bias_ptr, mask_ptr, acts_ptr, indices_ptr,
    L, GROUP_SIZE,
    K: tl.constexpr, LANES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program per (row, group)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    best_key = tl.full((), -1, tl.int32)
    best_column = tl.full((), 0, tl.int32)
    begin = group * GROUP_SIZE
    end = begin + GROUP_SIZE
    while begin < end:
        offs_l = begin + tl.arange(0, LANES)
        scores = tl.load(scores_ptr + row * L + offs_l, mask=offs_l < end, other=0.0).to(tl.float32)
        if HAS_BIAS:
            scores += tl.load(bias_ptr + offs_l, mask=offs_l < end, other=0.0)
        keys = relu_key(scores)
        if HAS_MASK:
            keys = tl.where(tl.load(mask_ptr + offs_l, mask=offs_l < end, other=0) != 0, keys, 0)
        keys = tl.where(offs_l < end, keys, -1)
        best_key, best_column = _better_of(best_key, best_column, keys, offs_l, 0)
        begin += LANES
    tl.store(acts_ptr + row * K + group, key_value(best_key))
    tl.store(indices_ptr + row * K + group, best_column.to(tl.int64))


def groupmax_encode(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D], dtype of x
    bias: Tensor,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    k: int,
    acts: Tensor,  # [N, K] float32, written
    indices: Tensor,  # [N, K] int64, written
) -> None:
    """The largest of each group of ``relu(x weightᵀ + bias)``, without [N, L] in memory."""
    N, D = x.shape
    L = weight.shape[0]
    config = configs.default_groupmax(x.dtype, gpu.gpu_family(x.device))
    _groupmax_encode_kernel[(triton.cdiv(N, config.BLOCK_N), k)](
        x, weight, bias, latent_mask, acts, indices,
        N, D, L, L // k,
        **groupmax_constexprs(D, k, x.dtype, config, has_mask=latent_mask is not None),
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def groupmax_constexprs(D: int, k: int, dtype: torch.dtype, config: configs.EncodeConfig, *, has_mask: bool) -> dict:
    """What `_groupmax_encode_kernel` is compiled for."""
    return {
        "K": k,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_L": config.BLOCK_L,
        "BLOCK_D": config.BLOCK_D,
        "EVEN_D": D % config.BLOCK_D == 0,
        "HAS_MASK": has_mask,
        "PRECISION": gpu.dot_precision(dtype),
        "INTERPRETED": gpu.interpreting(),
    }


def groupmax_select(
    scores: Tensor,  # [N, L]
    bias: Tensor | None,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    k: int,
    acts: Tensor,  # [N, K] float32, written
    indices: Tensor,  # [N, K] int64, written
) -> None:
    """The largest of each group of ``relu(scores + bias)``."""
    N, L = scores.shape
    lanes = min(1024, triton.next_power_of_2(L // k))
    _groupmax_select_kernel[(N, k)](
        scores, bias, latent_mask, acts, indices,
        L, L // k,
        K=k, LANES=lanes, HAS_BIAS=bias is not None, HAS_MASK=latent_mask is not None,
        num_warps=4 if lanes > 256 else 1, enable_fp_fusion=True,
    )  # fmt: skip
