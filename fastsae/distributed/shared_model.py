"""``--tp-plan``: all ranks run one model together, on the same batches; each has all activations, and none travel.

Shapes: N tokens of a batch, the same on every rank, D width in, E width out.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArtifactError
from .exchange import Exchange
from .latents import Latents
from .modules import Held, Modules
from .strategy import Train
from .world import World


class SharedModules(Modules):
    """Every rank owns some coders, as with ``--distribute-modules``, and keeps what it needs of its own activations.

    They are trained after the forward, when all ranks are through it: so the owners train at the same time.
    """

    def __init__(self, world: World, owner: Mapping[str, int]):
        super().__init__(world, owner)
        self._exchange = Exchange(world, [world.rank])

    def tokens(self, counts: list[int], signal: int) -> tuple[list[int], int]:
        return counts, _highest(self.world, signal)

    def deliver(self, hookpoint: str, x: Tensor, y: Tensor, train: Train) -> None:
        me = self.world.rank
        if me not in self._receivers[hookpoint]:
            return
        kept = self._exchange.start(y, [len(y)], [me])
        inputs = kept if x is y else self._exchange.start(x, [len(x)], [me])
        assert kept is not None
        assert inputs is not None
        self._held.append(Held(hookpoint, inputs, kept))
        if sum(held.y.nbytes for held in self._held) > self._held_bytes:
            self._train(train)

    def end_batch(self, train: Train) -> None:
        self._train(train)


class SharedLatents(Latents):
    """All ranks hold every coder together, as with ``--distribute-latents``, and train it while the model runs."""

    def __init__(self, world: World, device: torch.device):
        super().__init__(world, world.size, device)

    def tokens(self, counts: list[int], signal: int) -> tuple[list[int], int]:
        return counts, _highest(self.world, signal)

    def deliver(self, hookpoint: str, x: Tensor, y: Tensor, train: Train) -> None:
        rows = self.world.broadcast(y.contiguous())  # kernels that add in any order round differently on each rank
        train(hookpoint, rows if x is y else self.world.broadcast(x.contiguous()), rows)

    def end_batch(self, train: Train) -> None:
        """Nothing was held back."""


def check_same_rows(world: World, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise :class:`ArtifactError` where ranks read other data: together they would run the model on none of them."""
    sums = [[zlib.crc32(rows[key].numpy().tobytes()) for key in sorted(rows)] for rows in batches]
    if any(other != sums for other in world.every(sums)):
        raise ArtifactError(
            "dataset: expected the same rows in every process, which run one model together (--tp-plan), got different "
            "ones; is it the same data on every machine?"
        )


def _highest(world: World, signal: int) -> int:
    return max(row[0] for row in world.all_gather_sizes([signal]))
