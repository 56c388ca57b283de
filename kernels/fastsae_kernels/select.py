# pyright: basic
"""Exact top k of stored scores, deterministic, in one pass over them: the lemma is :mod:`.row_candidates`'.

Shapes: N tokens, L latents, K selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference
from .groupmax import groupmax_select
from .keys import pack_rank, relu_key
from .row_best import keep_best, write_row
from .row_candidates import count_candidates, publish, row_threshold, window_columns


@triton.jit
def _stored_keys(scores_ptr, bias_ptr, mask_ptr, offs, mask, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Keys of ``relu(scores + bias)`` at columns ``offs``; 0 outside ``mask`` and where the latent mask says so."""
    scores = tl.load(scores_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    keys = relu_key(scores)
    if HAS_MASK:
        keys = tl.where(tl.load(mask_ptr + offs, mask=mask, other=0) != 0, keys, 0)
    return keys


@triton.jit
def _select_kernel(
    scores_ptr, bias_ptr, mask_ptr, list_ptr, acts_ptr, indices_ptr,
    L, GROUP,
    K: tl.constexpr, BEST: tl.constexpr, WINDOW: tl.constexpr, LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program per row: group g holds the columns g + i·LANES, i < GROUP."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * L
    groups = tl.arange(0, LANES)
    first = tl.zeros((LANES,), tl.int32)
    second = tl.zeros((LANES,), tl.int32)
    member = tl.zeros((LANES,), tl.int32)
    i = tl.full((), 0, tl.int32)
    while i < GROUP:
        offs_l = i * LANES + groups
        keys = _stored_keys(scores_ptr, bias_ptr, mask_ptr, offs_l, offs_l < L, HAS_BIAS, HAS_MASK)
        second = tl.maximum(second, tl.minimum(first, keys))
        member = tl.where(keys > first, i, member)
        first = tl.maximum(first, keys)
        i += 1
    threshold = row_threshold(first, 1, K, BEST)
    num_singles, num_hidden = count_candidates(first, second, threshold)
    list_ptr += row * (WINDOW + max(BEST, WINDOW))
    best = tl.zeros((BEST,), tl.int64)
    begin = tl.full((), 0, tl.int32)
    while begin < num_singles + num_hidden * GROUP:
        tl.debug_barrier()  # the list's last readers are done
        publish(
            begin, first, second, groups + member * LANES, groups, threshold, 0, 0, num_singles, list_ptr, GROUP, WINDOW
        )
        tl.debug_barrier()
        columns, exists = window_columns(begin, num_singles, num_hidden, list_ptr, L, LANES, GROUP, WINDOW)
        keys = _stored_keys(scores_ptr, bias_ptr, mask_ptr, columns, exists, HAS_BIAS, HAS_MASK)
        ranks = tl.where(exists & (keys > 0), pack_rank(keys, columns), 0)
        best = keep_best(best, ranks, begin, list_ptr, K)
        begin += WINDOW
    write_row(best, acts_ptr + row * K, indices_ptr + row * K, K)


def select(pre_acts: Tensor, k: int, activation: str = "topk") -> Tensor:
    """Indices [N, K] of the selected entries of ``pre_acts`` [N, L]; twin of :func:`.reference.select`.

    Raises ``ValueError`` for float64, which the kernels do not compute in.
    """
    acts = torch.empty((pre_acts.shape[0], k), dtype=torch.float32, device=pre_acts.device)
    indices = torch.empty_like(acts, dtype=torch.int64)
    select_scores(pre_acts, None, None, k, activation, acts, indices)
    return indices


def select_scores(
    scores: Tensor,  # [N, L]
    bias: Tensor | None,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    k: int,
    activation: str,
    acts: Tensor,  # [N, K] float32, written
    indices: Tensor,  # [N, K] int64, written
) -> None:
    """Select from ``relu(scores + bias)``, latents outside ``latent_mask`` counting as 0."""
    if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"select: the Triton kernels take float32, float16 or bfloat16, got {scores.dtype}; "
            'use implementation="reference" for float64'
        )
    scores = scores.contiguous()
    N, L = scores.shape
    if N == 0:
        return
    if activation == "groupmax":
        groupmax_select(scores, bias, latent_mask, k, acts, indices)
        return
    if k > configs.MAX_SELECT_K:
        _sort_scores(scores, bias, latent_mask, k, acts, indices)
        return
    config = configs.select_config(L, k, scores.device)
    constexprs = select_constexprs(k, config, has_bias=bias is not None, has_mask=latent_mask is not None)
    lists = torch.empty((N, configs.list_length(k, 16)), dtype=torch.int64, device=scores.device)
    _select_kernel[(N,)](
        scores, bias, latent_mask, lists, acts, indices,
        L, triton.cdiv(L, config.LANES),
        **constexprs, num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _sort_scores(scores, bias, latent_mask, k, acts, indices) -> None:
    """The same by a stable sort, for selections too large for a window."""
    scores = (scores.float() if bias is None else scores.float() + bias).relu()
    if latent_mask is not None:
        scores = scores.masked_fill(~latent_mask, 0.0)
    indices.copy_(reference.select(scores, k))
    acts.copy_(scores.gather(1, indices))


def select_constexprs(k: int, config: configs.SelectConfig, *, has_bias: bool, has_mask: bool) -> dict:
    """What `_select_kernel` is compiled for."""
    return {
        "K": k,
        "BEST": configs.best(k),
        "WINDOW": configs.window(k, 16),
        "LANES": config.LANES,
        "HAS_BIAS": has_bias,
        "HAS_MASK": has_mask,
    }
