# pyright: basic
"""Exact top k of a token from the two words that the fused encoder keeps per group of latents.

Shapes: N tokens, D width, L latents, K active latents; groups of GROUP latents.

Why it is exact. Let a row's group hold keys k1 >= k2 >= ... (`keys.py`) and let T cut their low bits, which keeps
order. The words hold k1 in full and T(q2) of the second packed key q2, and T(q2) = T(k2). So the bound ``min(k1,
T(k2) | low bits) >= k2`` covers every other member, which is all that the lemma in `row_candidates.py` asks. If T(k1) >
T(k2), the first packed key is the maximum's, and its member is right; if T(k1) = T(k2), cut keys tie and the stored
member may be another's, but then the bound is k1, so that a group whose maximum can matter (k1 >= t) is hidden and
its members are looked at one by one. Cutting therefore never decides anything. Only keys below GROUP, activations
under 2^-144, cannot be told from 0: they count as 0, by FLOOR = GROUP.

Values and the order of summation. In a row without hidden groups the activations are the encoder's float32
accumulators, bit for bit: the result is what a float32 sort of them gives. In a row with hidden groups every
candidate is scored anew in one order (`_dot_rows`: BLOCK_D interleaved partial sums, then a tree), and both the
choice and the values follow these, so that equal rows of ``weight`` always tie. The two orders differ by float32
rounding of the sum, never by a rounding of the key: which columns are looked at again follows the accumulators, and
what is chosen among them follows the second look.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, gpu
from .keys import NAN_KEY, pack_rank, relu_key
from .row_best import keep_best, kth_best, write_row
from .row_candidates import count_candidates, group_column, publish, row_threshold, window_columns


@triton.jit
def _add_products(acc, d, x_ptr, weight_ptr, rows, exists, D, BLOCK_D: tl.constexpr):
    """``acc`` plus the products of the columns from ``d``."""
    offs_d = d + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    mask = exists[:, None] & (offs_d < D)[None, :]
    weight = tl.load(weight_ptr + rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc + weight * x[None, :]


@triton.jit
def _dot_rows(
    x_ptr, weight_ptr, columns, exists, D,
    WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Dot products of one token with the rows ``columns`` of the weight, float32 [WINDOW]."""
    acc = tl.zeros((WINDOW, BLOCK_D), dtype=tl.float32)
    rows = columns.to(tl.int64)[:, None] * D
    if INTERPRETED:  # see gemm_tile.py
        d = tl.full((), 0, tl.int32)
        while d < D:
            acc = _add_products(acc, d, x_ptr, weight_ptr, rows, exists, D, BLOCK_D)
            d += BLOCK_D
    else:
        for d in tl.range(0, D, BLOCK_D, num_stages=4):
            acc = _add_products(acc, d, x_ptr, weight_ptr, rows, exists, D, BLOCK_D)
    return tl.sum(acc, axis=1)


@triton.jit
def _load_maxima(maxima_ptr, groups, num_groups, GROUP: tl.constexpr, STRIDE: tl.constexpr):
    """Of each of ``groups``: its maximum's key, the bound on its other members, its maximum's column."""
    first = tl.load(maxima_ptr + groups, mask=groups < num_groups, other=0)
    second = tl.load(maxima_ptr + num_groups + groups, mask=groups < num_groups, other=0)
    return first, tl.minimum(first, second | (GROUP - 1)), group_column(groups, second & (GROUP - 1), STRIDE, GROUP)


@triton.jit
def _count_row(threshold, maxima_ptr, num_groups, GROUP: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr):
    """`count_candidates` of a whole row, SPAN groups at a time: bounds of all would not fit registers."""
    num_singles = tl.full((), 0, tl.int32)
    num_hidden = tl.full((), 0, tl.int32)
    span = tl.full((), 0, tl.int32)
    while span < num_groups:
        first, bound, _ = _load_maxima(maxima_ptr, span + tl.arange(0, SPAN), num_groups, GROUP, STRIDE)
        singles, hidden = count_candidates(first, bound, threshold)
        num_singles += singles
        num_hidden += hidden
        span += SPAN
    return num_singles, num_hidden


@triton.jit
def _publish_row(
    begin, threshold, num_singles, maxima_ptr, num_groups, list_ptr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`publish` of a whole row, SPAN groups at a time from cache: addresses of all would not fit registers."""
    singles_before = tl.full((), 0, tl.int32)
    hidden_before = tl.full((), 0, tl.int32)
    span = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # the list's last readers are done
    while span < num_groups:
        groups = span + tl.arange(0, SPAN)
        first, bound, columns = _load_maxima(maxima_ptr, groups, num_groups, GROUP, STRIDE)
        publish(
            begin, first, bound, columns, groups, threshold, singles_before, hidden_before, num_singles, list_ptr,
            GROUP, WINDOW,
        )  # fmt: skip
        singles, hidden = count_candidates(first, bound, threshold)
        singles_before += singles
        hidden_before += hidden
        span += SPAN
    tl.debug_barrier()


@triton.jit
def _resolve_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, list_ptr, acts_ptr, indices_ptr,
    D, L, num_groups,
    K: tl.constexpr, BEST: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, HAS_MASK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per token: the top K of a row of group maxima, re-scoring where a group hides members."""
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr += row * (2 * num_groups)
    list_ptr += row * (WINDOW + max(BEST, WINDOW))
    groups = tl.arange(0, P)
    first = tl.load(maxima_ptr + groups, mask=groups < num_groups, other=0)
    threshold = row_threshold(first, GROUP, K, BEST)
    num_singles, num_hidden = _count_row(threshold, maxima_ptr, num_groups, GROUP, STRIDE, SPAN)
    total = num_singles + num_hidden * GROUP
    best = tl.zeros((BEST,), tl.int64)
    begin = tl.full((), 0, tl.int32)
    while begin < total:
        _publish_row(begin, threshold, num_singles, maxima_ptr, num_groups, list_ptr, GROUP, STRIDE, SPAN, WINDOW)
        cols, exists = window_columns(begin, num_singles, num_hidden, list_ptr, L, STRIDE, GROUP, WINDOW)
        if num_hidden > 0:
            scores = _dot_rows(x_ptr + row * D, weight_ptr, cols, exists, D, WINDOW, BLOCK_D, INTERPRETED)
            keys = relu_key(scores + tl.load(bias_ptr + cols, mask=exists, other=0.0))
            if HAS_MASK:
                keys = tl.where(tl.load(mask_ptr + cols, mask=exists, other=0) != 0, keys, 0)
        else:
            group = cols // (STRIDE * GROUP) * STRIDE + cols % STRIDE
            keys = tl.load(maxima_ptr + group, mask=exists, other=0)
        ranks = tl.where(exists & (keys >= GROUP), pack_rank(keys, cols), 0)
        best = keep_best(best, ranks, begin, list_ptr, K)
        is_member = begin + tl.arange(0, WINDOW) >= num_singles
        begin += WINDOW
        if begin >= num_singles:  # hidden groups come block by block: a flood of NaN ends here, nothing ranks above it
            block = tl.max(tl.where(is_member & exists, cols // (STRIDE * GROUP), 0), axis=0) * (STRIDE * GROUP)
            if kth_best(best, K) > pack_rank(tl.full((), NAN_KEY, tl.int32), block):
                begin = total
    write_row(best, acts_ptr + row * K, indices_ptr + row * K, K)


def resolve(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D], dtype of x
    bias: Tensor,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    maxima: Tensor,  # [>= N, 2, P] int32
    k: int,
    config: configs.EncodeConfig,
    acts: Tensor,  # [N, K] float32, written
    indices: Tensor,  # [N, K] int64, written
) -> None:
    """The top k of every token from :func:`group_maxima`'s words."""
    (N, D), L = x.shape, weight.shape[0]
    num_groups = config.num_groups(L)
    rows = configs.resolve_config(num_groups, k, config.GROUP, gpu.gpu_family(x.device))
    lists = torch.empty((N, configs.list_length(k, config.GROUP)), dtype=torch.int64, device=x.device)
    _resolve_kernel[(N,)](
        x, weight, bias, latent_mask, maxima, lists, acts, indices,
        D, L, num_groups,
        **resolve_constexprs(L, k, config, rows, has_mask=latent_mask is not None),
        num_warps=rows.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def resolve_constexprs(
    L: int, k: int, config: configs.EncodeConfig, rows: configs.ResolveConfig, *, has_mask: bool
) -> dict:
    """What `_resolve_kernel` is compiled for."""
    P = triton.next_power_of_2(config.num_groups(L))
    return {
        "K": k,
        "BEST": configs.best(k),
        "P": P,
        "SPAN": min(P, 1024),
        "WINDOW": rows.WINDOW,
        "BLOCK_D": rows.BLOCK_D,
        "GROUP": config.GROUP,
        "STRIDE": config.STRIDE,
        "HAS_MASK": has_mask,
        "INTERPRETED": gpu.interpreting(),
    }
