"""Exact row TopK on a CPU by group maxima, without sorting rows.

Shapes: N tokens, L latents, K active latents; n rows of a chunk, C candidates.

Lemma. Split a row into groups and let T be any k groups with the largest maxima, t the smallest of these
maxima. Every entry outside T is <= its own group's maximum <= t, and T already holds k entries >= t. So the
members of T contain k largest entries of the row. One streaming pass finds the maxima; only k·GROUP
members are looked at again. Groups are strided (j, j + L/GROUP, ...), which makes that pass elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import best

GROUP = 16


def candidates(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries that contain the ``count`` largest of each row: values [n, C], columns [n, C], and [n] the largest
    group maximum left out, which bounds every other entry (-inf where none is left out).

    Where the groups would cover most of the row anyway, every entry is a candidate.
    """
    n, num_latents = scores.shape
    width = num_latents // GROUP
    if 2 * count > width:
        return scores, torch.arange(num_latents).expand(n, -1), scores.new_full((n,), -torch.inf)
    maxima = scores[:, : width * GROUP].unflatten(1, (GROUP, width)).amax(1)  # [n, L / GROUP]
    top, groups = maxima.topk(count + 1, dim=1)
    columns = (groups[:, None, :-1] + torch.arange(0, width * GROUP, width)[:, None]).flatten(1)  # [n, GROUP · count]
    if width * GROUP < num_latents:
        columns = torch.cat([columns, torch.arange(width * GROUP, num_latents).expand(n, -1)], 1)
    return scores.gather(1, columns), columns, top[:, -1]


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of ReLU(scores) [n, L]: values and columns [n, K], in the order of the contract."""
    values, columns, left_out = candidates(scores, k)
    top, position = values.topk(min(k + 1, values.shape[1]), dim=1)
    kth = top[:, k - 1]
    runner_up = torch.maximum(left_out, top[:, k]) if top.shape[1] > k else left_out
    top, top_columns = top[:, :k], columns.gather(1, position[:, :k])
    # Boundary ties, inside the candidates or in groups left out, are decided by index: sort these rows in full, and
    # those with NaN. Where fewer than k are positive, all positive ones are here, and fill_zeros places the zeros.
    rows = (~(runner_up < kth) & ~(kth <= 0)).nonzero()[:, 0]
    if len(rows):
        exact = scores[rows].relu().sort(dim=1, descending=True, stable=True)
        top[rows], top_columns[rows] = exact.values[:, :k], exact.indices[:, :k]
    return ordered(top.relu(), top_columns, k)


def ordered(values: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [n, C >= K] distinct columns, larger first, equal ones by column; zeros filled in."""
    return fill_zeros(*best(values, columns, k))


def fill_zeros(top_acts: Tensor, top_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Give every trailing slot that is not positive the value 0 and the smallest column not yet in its row."""
    k = top_acts.shape[1]
    rows = (top_acts[:, -1] <= 0).nonzero()[:, 0]
    if not len(rows):
        return top_acts, top_indices
    acts, indices = top_acts[rows], top_indices[rows]
    empty = acts <= 0  # [r, K]; NaN is not empty
    # with p taken, the k - p first free columns lie below k
    taken = indices.new_zeros(len(rows), k + 1, dtype=torch.uint8)
    taken.scatter_(1, indices.clamp(max=k).masked_fill(empty, k), 1)
    free = taken[:, :k].sort(dim=1, stable=True).indices
    before = (~empty).sum(1, keepdim=True)
    slot = torch.arange(k, device=indices.device) - before  # how many empty slots come before this one
    filled = torch.where(empty, free.gather(1, slot.clamp(min=0)), indices)
    top_acts, top_indices = top_acts.clone(), top_indices.clone()
    top_acts[rows], top_indices[rows] = acts.masked_fill(empty, 0.0), filled
    return top_acts, top_indices
