"""Rows of activations from every rank, joined in the order of ranks on those that want them, while other work goes on.

Shapes: N rows of this rank, M rows of all ranks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .world import World, peers_needed


class Exchange:
    """Between the ranks ``members`` (numbers in ``world``, ascending); every one of them makes the same calls."""

    def __init__(self, world: World, members: Sequence[int]):
        self.world, self._members = world, members
        self._sending: list[tuple[Any, Tensor]] = []
        self._tag = 0

    def start(self, rows: Tensor, counts: Sequence[int], receivers: Sequence[int]) -> Joined | None:
        """Send ``rows`` [N, D] on their way; what will be all members' on a receiver, None on the others.

        ``counts`` are the members' numbers of rows. ``rows`` may be overwritten afterwards.
        """
        me, self._tag = self.world.rank, (self._tag + 1) % 2**20
        sends, receives, joined = [], [], None
        if me in receivers:
            joined = rows.new_empty((sum(counts), rows.shape[1]))
            for member, part in zip(self._members, joined.split(list(counts)), strict=True):
                if member == me:
                    part.copy_(rows)
                elif len(part):
                    receives.append(dist.P2POp(dist.irecv, part, member, tag=self._tag))
        others = [rank for rank in receivers if rank != me] if len(rows) else []
        copy = rows.clone(memory_format=torch.contiguous_format) if others else rows
        if others:
            sends = [dist.P2POp(dist.isend, copy, rank, tag=self._tag) for rank in others]
            self.world.sent += len(others) * copy.nbytes
        with peers_needed(self.world):
            works = dist.batch_isend_irecv(sends + receives) if sends or receives else []
        each = len(works) == len(sends) + len(receives)  # else one work for all, as NCCL's
        if others:
            self._sending += [(work, copy) for work in (works[: len(sends)] if each else works)]
        return None if joined is None else Joined(joined, works[len(sends) :] if each else works, self.world)

    def finish(self) -> None:
        """Until everything sent has left."""
        with peers_needed(self.world):
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()


class Joined:
    """Rows that are on their way."""

    def __init__(self, rows: Tensor, works: list[Any], world: World):
        self._rows, self._works, self._world = rows, works, world
        self.nbytes = rows.nbytes

    def wait(self) -> Tensor:
        """The rows of all members, [M, D]."""
        with peers_needed(self._world):
            for work in self._works:
                work.wait()
        self._works = []
        return self._rows
