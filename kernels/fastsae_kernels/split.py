"""A coder whose latents are split over ranks: what the ranks find out together, without a matrix [N, L].

Shapes: N tokens, L latents of all ranks, K slots per token, P ranks, R dead latents of this rank, n tokens of a block.

The K best of all latents are among the K best of every rank, so these candidates are all that travels; activation
and column in one integer (:mod:`.ranks`) make the choice among them exact, ties included. Decoded parts, and what
the encoders add to b_dec's gradient, are summed over ranks. The rest a rank does for its own rows alone.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ranks import best, pack, unpack


class Peers(Protocol):
    """The ranks that hold a coder's latents. All call the same methods in the same order, for the same tokens."""

    rank: int
    begin: int
    """This rank holds the latents ``begin ... end - 1`` of ``num_latents``."""

    end: int
    num_latents: int

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's ``part``, of one shape, in the order of ranks: [P, ...]."""
        ...

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks, the same bits on all of them; ``part`` may be overwritten."""
        ...


def own_k(k: int, activation: str, peers: Peers) -> int:
    """How many candidates this rank encodes; raises ``ValueError`` where a GroupMax group lies on two ranks."""
    own = peers.end - peers.begin
    if activation == "topk":
        return min(k, own)
    size = peers.num_latents // k
    if peers.begin % size or own % size:
        raise ValueError(
            f"groupmax: expected whole groups of {size} latents on every rank, got latents {peers.begin} to {peers.end}"
        )
    return own // size


def own_winners(
    acts: Tensor,  # [N, own K]: this rank's candidates
    indices: Tensor,  # [N, own K], counted from its first latent
    k: int,
    first_k: int,
    peers: Peers,
) -> tuple[Tensor, Tensor, int]:
    """The candidates that are among the k best of all ranks', [N, W] each, and how many of W lie below ``first_k``.

    Slots without one have activation 0. W is as small as the tokens allow, up to powers of two: decoding and the way
    back cost a rank no more than its share.
    """
    columns, missing = indices + peers.begin, k - acts.shape[1]
    if acts.dtype == torch.float32:
        gathered = _side_by_side(peers.gather(pad(pack(acts, columns), (0, missing), value=-1)))
        acts, columns = unpack(gathered.topk(k, dim=1).values)
    else:
        all_acts = _side_by_side(peers.gather(pad(acts, (0, missing), value=-1.0)))
        acts, columns = best(all_acts, _side_by_side(peers.gather(pad(columns, (0, missing), value=0))), k)
    used = (columns >= peers.begin) & (columns < peers.end) & (acts != 0)
    slots = [slice(0, first_k), slice(first_k, k)] if first_k else [slice(0, k)]
    own = columns - peers.begin
    parts = [_packed(acts[:, part], own[:, part], used[:, part], peers.end - peers.begin) for part in slots]
    own_acts, own_indices = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return own_acts, own_indices, parts[0][0].shape[1] if first_k else 0


def all_winners(acts: Tensor, indices: Tensor, k: int, peers: Peers) -> tuple[Tensor, Tensor]:
    """From every rank's own winners those of all, [N, K] each: larger first; slots that stay empty are 0."""
    empty = k - acts.shape[1]
    all_acts = _side_by_side(peers.gather(pad(acts, (0, empty))))
    return best(all_acts, _side_by_side(peers.gather(pad(indices + peers.begin, (0, empty)))), k)


def keep_largest(acts: Tensor, k: int, num_dead: int, peers: Peers) -> Tensor:  # [n, R] -> [n, R]
    """:func:`.auxk.keep_largest` over the dead latents of all ranks, ``num_dead`` of them, in the order of ranks."""
    if num_dead <= k:
        return acts
    few = min(k, acts.shape[1])
    tops = peers.gather(pad(acts.topk(few, dim=1).values, (0, k - few), value=-1.0))  # [P, n, k]
    least = _side_by_side(tops).topk(k, dim=1).values[:, -1:]  # [n, 1]
    room = k - (tops > least).sum((0, 2)) - (tops[: peers.rank] == least).sum((0, 2))  # [n]: for ties, of this rank's
    above, level = acts > least, acts == least
    return acts.masked_fill(~(above | (level & (level.cumsum(1) <= room[:, None]))), 0.0)


def _side_by_side(parts: Tensor) -> Tensor:  # [P, n, C] -> [n, P · C]
    return parts.transpose(0, 1).flatten(1)


def _packed(acts: Tensor, columns: Tensor, used: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Used slots first, in their order, and no more columns than they need (at most ``limit``); the others 0."""
    most = max(1, int(used.sum(1).max())) if len(used) else 1
    width = min(used.shape[1], limit, 1 << (most - 1).bit_length())  # few widths: each compiles its kernels
    order = (~used).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
    acts, columns = acts.masked_fill(~used, 0.0), columns.masked_fill(~used, 0)
    return acts.gather(1, order), columns.gather(1, order)
