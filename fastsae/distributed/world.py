"""The processes of a run: how many, which of them this is, on which device, and what they say to each other.

"rank" is a process's number over all machines: it chooses its data. "local rank" is its number on its machine: it
chooses its device. Without torchrun there is a world of one, which starts nothing and whose methods do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LostRankError, first_line

TIMEOUT = timedelta(minutes=30)
"""The longest that ranks wait for each other in a step: a checkpoint is written meanwhile."""

PATIENCE = timedelta(hours=12)
"""The longest that ranks wait for another to tokenise a dataset."""

Value = TypeVar("Value")


@dataclass
class World:
    """``size`` processes, of which this is number ``rank``; ``local_rank`` of ``local_size`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: Any = field(default=None, repr=False)
    """A process group for tensors on the CPU; None in a world of one."""
    patient: Any = field(default=None, repr=False)
    """The same, waiting longer."""
    group: Any = field(default=None, repr=False)
    """The processes that :meth:`all_reduce` is over; None: all of the job."""
    sent: int = field(default=0, repr=False)
    """Bytes given to collectives by this rank, so far."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, and writes files."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """This rank's share of ``count`` things in order: shares differ by at most one, and may be empty."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, the same bits on every rank."""
        return self.all_reduce(tensor, dist.ReduceOp.SUM)

    def all_max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all ranks, in place."""
        return self.all_reduce(tensor, dist.ReduceOp.MAX)

    def all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            self.sent += tensor.nbytes
            with peers_needed(self):
                dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def all_gather_sizes(self, sizes: list[int]) -> list[list[int]]:
        """Every rank's ``sizes`` (equally many), by rank; known to the host without waiting for a GPU."""
        if self.size == 1:
            return [sizes]
        own = torch.tensor(sizes, dtype=torch.int64)
        every = [torch.empty_like(own) for _ in range(self.size)]
        self.sent += own.nbytes
        with peers_needed(self):
            dist.all_gather(every, own, group=self.host)
        return [numbers.tolist() for numbers in every]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Rank ``source``'s tensor, in place."""
        if self.size > 1:
            self.sent += tensor.nbytes if self.rank == source else 0
            with peers_needed(self):
                dist.broadcast(tensor, source)
        return tensor

    def share(self, value: Value) -> Value:
        """Rank 0's ``value``, anything that pickles, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with peers_needed(self):
            dist.broadcast_object_list(box, 0, group=self.patient)
        return box[0]

    def every(self, value: Value) -> list[Value]:
        """Every rank's ``value``, anything that pickles, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with peers_needed(self):
            dist.all_gather_object(values, value, group=self.host)
        return values

    def wait(self) -> None:
        """Until every rank is here; patiently."""
        if self.size > 1:
            with peers_needed(self):
                dist.barrier(group=self.patient)

    @contextmanager
    def one_first(self, *, of_machine: bool = True) -> Iterator[None]:
        """The block runs in one process per machine, or in rank 0, before it runs elsewhere: it may fill a cache."""
        number = self.local_rank if of_machine else self.rank
        if number != 0:
            self.wait()
        yield
        if number == 0:
            self.wait()


@contextmanager
def peers_needed(world: World) -> Iterator[None]:
    """What torch raises where another rank is gone, or does not come, becomes a :class:`LostRankError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {world.rank} stops: another rank ended, failed or did not answer, and says why itself "
            f"({first_line(error)})"
        ) from error
