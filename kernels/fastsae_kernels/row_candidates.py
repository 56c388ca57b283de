# pyright: basic
"""Which of a row's latents can be among its top K, from group maxima: what both selects have in common.

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

import triton
import triton.language as tl

from .keys import kth_largest


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
