# pyright: basic
"""The sorted list of a row's best candidates so far, and the selection written from it.

Shapes: K selected, BEST >= K the list's length, WINDOW candidates looked at together. A candidate is a rank of
:mod:`.keys`: its key and its column in one int64; 0 is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import rank_column, rank_key


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
