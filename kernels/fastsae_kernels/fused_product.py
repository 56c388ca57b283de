# pyright: basic
"""A matrix product whose epilogue keeps two words per group of scores: what the fused encoder selects from.

Shapes: N tokens, D width, L latents, P groups of GROUP latents each (`row_candidates.group_column`).

`_encode_kernel` computes a tile of scores, packs each into a key whose low bits are replaced by the member's
number inside its strided group, and keeps per (token, group) the two largest packed keys, as two words: the full
bits of the group's maximum, and ``(second packed key with its low bits cut) ‖ (member of the first)``. The stride is
the one at which a thread of the matrix unit owns all members, so that the reduction crosses no lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, gpu
from .gemm_tile import tile_operands, tile_scores
from .keys import relu_key


@triton.jit(do_not_specialize=["N"])
def _encode_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr,
    N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SWIZZLE_N: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_L: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per tile; PERSISTENT: one per multiprocessor, which loads a tile while it reduces the last one."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    if PERSISTENT and INTERPRETED:  # see gemm_tile.py
        tile = tl.program_id(0)
        while tile < tiles:
            _encode_tile(
                tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D, GROUP,
                STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
            tile += tl.num_programs(0)
    elif PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _encode_tile(
                tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D, GROUP,
                STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        _encode_tile(
            tl.program_id(0), x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D,
            GROUP, STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _encode_tile(
    tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SWIZZLE_N: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_L: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The two words of a tile's groups; blocks of SWIZZLE_N token blocks sweep the latents together."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_l = tl.cdiv(L, BLOCK_L)
    first_n = tile // (SWIZZLE_N * blocks_l) * SWIZZLE_N
    swizzle = tl.minimum(blocks_n - first_n, SWIZZLE_N)
    pid_n = first_n + tile % (SWIZZLE_N * blocks_l) % swizzle
    pid_l = tile % (SWIZZLE_N * blocks_l) // swizzle
    scores = tile_scores(
        x_ptr, weight_ptr, bias_ptr, pid_n * BLOCK_N, pid_l * BLOCK_L, N, D, L,
        BLOCK_N, BLOCK_L, BLOCK_D, EVEN_D, DESCRIPTORS, PRECISION, INTERPRETED,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_l = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    keys = relu_key(scores)
    if HAS_MASK:
        kept = tl.load(mask_ptr + offs_l, mask=offs_l < L, other=0) != 0
        keys = tl.where(kept[None, :], keys, 0)
    if not EVEN_L:
        keys = tl.where((offs_l < L)[None, :], keys, 0)
    keys = tl.reshape(keys, (BLOCK_N, BLOCK_L // (STRIDE * GROUP), GROUP, STRIDE))
    first, second = _two_largest(keys, GROUP)
    offs_g = pid_l * (BLOCK_L // GROUP) + tl.arange(0, BLOCK_L // GROUP)
    num_groups = blocks_l * (BLOCK_L // GROUP)
    offs = offs_n.to(tl.int64)[:, None] * (2 * num_groups) + offs_g[None, :]
    inside = (offs_n < N)[:, None]
    tl.store(maxima_ptr + offs, tl.reshape(first, (BLOCK_N, BLOCK_L // GROUP)), mask=inside)
    tl.store(maxima_ptr + offs + num_groups, tl.reshape(second, (BLOCK_N, BLOCK_L // GROUP)), mask=inside)


@triton.jit
def _two_largest(keys, GROUP: tl.constexpr):
    """The two words of each group of ``keys`` [.., .., GROUP, ..]: see the top of this file."""
    member = tl.arange(0, GROUP)[None, None, :, None]
    packed = (keys & -GROUP) | (GROUP - 1 - member)  # of equal cut keys the smaller member is larger
    top = tl.max(packed, axis=2)
    runner_up = tl.max(tl.where(packed == tl.expand_dims(top, 2), 0, packed), axis=2)
    return tl.max(keys, axis=2), (runner_up & -GROUP) | (GROUP - 1 - (top & (GROUP - 1)))


def group_maxima(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D], dtype of x
    bias: Tensor,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    maxima: Tensor,  # [>= N, 2, P] int32, written
    config: configs.EncodeConfig,
) -> None:
    """The two words of every (token, group): the fused product alone."""
    N, D = x.shape
    L = weight.shape[0]
    operands = tile_operands(x, weight, config.BLOCK_N, config.BLOCK_L, config.BLOCK_D) if config.descriptors else None
    x_operand, weight_operand = operands or (x, weight)
    programs = triton.cdiv(N, config.BLOCK_N) * triton.cdiv(L, config.BLOCK_L)
    constexprs = maxima_constexprs(
        D, L, x.dtype, config, has_mask=latent_mask is not None, descriptors=operands is not None
    )
    if constexprs["PERSISTENT"]:
        programs = min(programs, gpu.multiprocessors(x.device))
    _encode_kernel[(programs,)](
        x_operand, weight_operand, bias, latent_mask, maxima,
        N, D, L,
        **constexprs, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def maxima_constexprs(
    D: int, L: int, dtype: torch.dtype, config: configs.EncodeConfig, *, has_mask: bool, descriptors: bool
) -> dict:
    """What `_encode_kernel` is compiled for."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_L": config.BLOCK_L,
        "BLOCK_D": config.BLOCK_D,
        "GROUP": config.GROUP,
        "STRIDE": config.STRIDE,
        "SWIZZLE_N": config.SWIZZLE_N,
        "EVEN_D": D % config.BLOCK_D == 0,
        "EVEN_L": L % config.BLOCK_L == 0,
        "HAS_MASK": has_mask,
        "DESCRIPTORS": descriptors,
        "PERSISTENT": config.persistent and descriptors == config.descriptors,
        "PRECISION": gpu.dot_precision(dtype),
        "INTERPRETED": gpu.interpreting(),
    }
