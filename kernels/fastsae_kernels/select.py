# pyright: basic
"""Exact top k of a row from group maxima, deterministic, in one pass over the scores.

Shapes: N tokens, L latents, K selected. A row's latents are dealt into P groups (``group_column`` below says which
columns belong to which group); for each group the row has

    first  [P]  the key of its largest member (`keys.py`), and that member's column,
    bound  [P]  no smaller than the key of any other member.

Let t be the K-th largest ``first``, but at least FLOOR = 1, the key of the smallest positive activation. Where t is
not raised to FLOOR, K keys reach it already, so every positive member of the top K has key >= t. A group with
``bound < t`` can contribute its maximum only: a *single*. A group with ``bound >= t`` may hide further members: all
its members are looked at again.
Singles and members of hidden groups are therefore a superset of the positive top K, for any distribution and any
number of ties. They pass through a sorted list of the BEST >= K best ones, WINDOW at a time: no buffer can overflow.
What is missing to K is filled with zeros at the smallest columns that are left; K columns always suffice for that.

Among random scores about K² / 2P groups per row are hidden, so that the second look costs little. Ties are decided
by the smaller column, NaN comes first: see `keys.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference
from .groupmax import groupmax_select
from .keys import kth_largest, pack_rank, rank_column, rank_key, relu_key


@triton.jit
def group_column(group, member, STRIDE, GROUP):
    """Column of a group's member: groups come in blocks of STRIDE, whose members alternate with period STRIDE."""
    return (group // STRIDE) * (STRIDE * GROUP) + group % STRIDE + member * STRIDE


@triton.jit
def row_threshold(first, FLOOR: tl.constexpr, K: tl.constexpr, BEST: tl.constexpr):
    """The K-th largest of ``first`` [P], at least FLOOR."""
    P: tl.constexpr = first.shape[0]
    lo = tl.full((), 0, tl.int32)
    if P >= BEST:  # BEST >= K parts: the least of their maxima is reached by at least K groups
        lo = tl.min(tl.max(tl.reshape(first, (BEST, P // BEST)), axis=1), axis=0)
    return tl.maximum(kth_largest(first, lo, tl.max(first, axis=0), K), FLOOR)


@triton.jit
def count_candidates(first, bound, threshold):
    """How many groups are single, and how many hidden."""
    single = (first >= threshold) & (bound < threshold)
    return tl.sum(single.to(tl.int32), axis=0), tl.sum((bound >= threshold).to(tl.int32), axis=0)


@triton.jit
def publish(
    begin, first, bound, columns, groups, threshold, singles_before, hidden_before, num_singles, list_ptr,
    GROUP, WINDOW: tl.constexpr,
):  # fmt: skip
    """Put those of some groups that window ``begin + [0, WINDOW)`` needs on ``list_ptr`` int64 [2, WINDOW].

    First the columns of singles, then the numbers of hidden groups. ``*_before`` count earlier groups' candidates.
    """
    hidden = bound >= threshold
    single = (first >= threshold) & (bound < threshold)
    places = tl.cumsum((hidden.to(tl.int32) << 16) | single.to(tl.int32), axis=0)  # two counts in one scan
    hidden_at = ((places >> 16) & 0xFFFF) + hidden_before - 1 - tl.maximum(begin - num_singles, 0) // GROUP
    single_at = (places & 0xFFFF) + singles_before - 1 - begin
    at = tl.where(hidden, hidden_at, single_at)
    inside = (hidden | single) & (at >= 0) & (at < WINDOW)
    tl.store(list_ptr + tl.where(hidden, at + WINDOW, at), tl.where(hidden, groups, columns).to(tl.int64), mask=inside)


@triton.jit
def window_columns(begin, num_singles, num_hidden, list_ptr, L, STRIDE, GROUP, WINDOW: tl.constexpr):
    """Columns of the candidates number ``begin + [0, WINDOW)`` and whether they exist: singles, then hidden members."""
    offs = tl.arange(0, WINDOW)
    is_single = begin + offs < num_singles
    member = tl.maximum(begin + offs - num_singles, 0)
    is_member = (begin + offs >= num_singles) & (member < num_hidden * GROUP)
    group_at = member // GROUP - tl.maximum(begin - num_singles, 0) // GROUP
    entry = tl.load(list_ptr + tl.where(is_member, group_at + WINDOW, offs), mask=is_single | is_member, other=0)
    entry = entry.to(tl.int32)
    column = tl.where(is_single, entry, group_column(entry, member % GROUP, STRIDE, GROUP))
    return column, (is_single | is_member) & (column < L)


@triton.jit
def _count_larger(ranks, others_ptr, end):
    """For each of ``ranks``, how many of the ``end`` (a multiple of 16) ranks at ``others_ptr`` are larger."""
    STEP: tl.constexpr = 16 if ranks.shape[0] <= 256 else max(2, 2048 // ranks.shape[0])  # held in registers
    offs = tl.arange(0, STEP)
    count = tl.zeros(ranks.shape, tl.int32)
    i = tl.full((), 0, tl.int32)
    while i < end:
        others = tl.load(others_ptr + i + offs)
        count += tl.sum((others[None, :] > ranks[:, None]).to(tl.int32), axis=1)
        i += STEP
    return count


@triton.jit
def keep_best(best, ranks, begin, list_ptr, K: tl.constexpr):
    """The largest of ``best`` [BEST] (descending) and ``ranks`` [WINDOW] (any order, none in ``best``), descending.

    Every rank goes to the place that counting the larger ones gives it: for the few there are, this needs far
    fewer barriers than a sorting network. ``list_ptr`` int64 [WINDOW + BEST] is scratch; ``begin == 0`` says that
    ``best`` is empty. Does nothing where no rank is better than the K-th best.
    """
    WINDOW: tl.constexpr = ranks.shape[0]
    BEST: tl.constexpr = best.shape[0]
    if (begin == 0) | (tl.max(ranks, axis=0) > kth_best(best, K)):
        slots = tl.arange(0, BEST)
        tl.debug_barrier()
        tl.store(list_ptr + tl.arange(0, WINDOW), ranks)
        tl.store(list_ptr + WINDOW + slots, best)
        tl.debug_barrier()
        place = _count_larger(ranks, list_ptr, tl.where(begin == 0, WINDOW, WINDOW + BEST))
        best_place = slots + _count_larger(best, list_ptr, tl.where(begin == 0, 0, WINDOW))
        num_ranks = tl.sum((ranks > 0).to(tl.int32), axis=0) + tl.sum((best > 0).to(tl.int32), axis=0)
        tl.debug_barrier()
        tl.store(list_ptr + place, ranks, mask=(ranks > 0) & (place < BEST))
        tl.store(list_ptr + best_place, best, mask=(best > 0) & (best_place < BEST))
        tl.debug_barrier()
        best = tl.load(list_ptr + slots, mask=slots < num_ranks, other=0)
    return best


@triton.jit
def kth_best(best, K: tl.constexpr):
    """The K-th of descending ranks, 0 if there are fewer."""
    return tl.max(tl.where(tl.arange(0, best.shape[0]) == K - 1, best, 0), axis=0)


@triton.jit
def write_row(best, acts_ptr, indices_ptr, K: tl.constexpr):
    """Write K activations and indices of one row; zeros at the smallest unused columns where ``best`` has fewer."""
    BEST: tl.constexpr = best.shape[0]
    keys = rank_key(best)
    columns = rank_column(best)
    slots = tl.arange(0, BEST)
    found = (keys > 0) & (slots < K)
    num_found = tl.sum(found.to(tl.int32), axis=0)
    if num_found < K:  # the row of indices first serves as a row of flags: which of the columns 0..K-1 are taken
        tl.store(indices_ptr + slots, tl.zeros((BEST,), tl.int64), mask=slots < K)
        tl.debug_barrier()
        tl.store(indices_ptr + columns, tl.full((BEST,), 1, tl.int64), mask=found & (columns < K))
        tl.debug_barrier()
        free = (tl.load(indices_ptr + slots, mask=slots < K, other=1) == 0) & (slots < K)
        tl.debug_barrier()
        slot = num_found + tl.cumsum(free.to(tl.int32), axis=0) - 1
        tl.store(indices_ptr + slot, slots.to(tl.int64), mask=free & (slot < K))
        tl.store(acts_ptr + slot, tl.zeros((BEST,), tl.float32), mask=free & (slot < K))
    tl.store(indices_ptr + slots, columns.to(tl.int64), mask=found)
    tl.store(acts_ptr + slots, keys.to(tl.float32, bitcast=True), mask=found)


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
