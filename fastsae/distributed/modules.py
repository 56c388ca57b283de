"""``--distribute-modules``: every rank owns some coders, and trains them on the whole batch.

Shapes: N tokens of a batch on this rank, M tokens on all, D width in, E width out.

Each rank runs the model on its own part of a batch. Where a hookpoint's activations appear they leave for the coders'
owner, and the model goes on; what has arrived is trained on after the forward, when every rank has all it waits for
on its way: so the owners train at the same time. No rank waits in the middle of its forward for one that is
behind it, unless what it holds back grows too large, and then only for what all have already passed or will pass
without waiting for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..errors import HookpointError
from .exchange import Exchange, Joined
from .strategy import Strategy, Train, Value
from .world import World

HELD_BYTES = 2 << 30
"""Joined activations that an owner holds back, before it trains in the middle of the model's forward."""


class Held(NamedTuple):
    """A hookpoint's activations on their way to this rank."""

    hookpoint: str
    x: Joined
    y: Joined


class Modules(Strategy):
    """``owner`` is the rank of every coder, by name."""

    fuses = True  # an owner sees the whole batch: nobody else's gradients are to come

    def __init__(self, world: World, owner: Mapping[str, int], held_bytes: int = HELD_BYTES):
        super().__init__(world)
        self.owner, self._held_bytes = owner, held_bytes
        self._exchange = Exchange(world, range(world.size))
        self._receivers: dict[str, list[int]] = {}
        for name, rank in owner.items():
            ranks = self._receivers.setdefault(name.partition("/")[0], [])
            if rank not in ranks:
                ranks.append(rank)
        self._counts: deque[tuple[int, ...]] = deque()  # tokens by rank, of each batch to come
        self._held: list[Held] = []

    def owns(self, coder: str) -> bool:
        return self.owner[coder] == self.world.rank

    def tokens(self, counts: list[int], signal: int) -> tuple[list[int], int]:
        every = self.world.all_gather_sizes([signal, *counts])
        signals, *batches = zip(*every, strict=True)
        self._counts = deque(batch for batch in batches if sum(batch))
        return [sum(batch) for batch in batches], max(signals)

    def deliver(self, hookpoint: str, x: Tensor, y: Tensor, train: Train) -> None:
        counts, receivers = self._counts[0], self._receivers[hookpoint]
        if len(y) != counts[self.world.rank]:
            raise HookpointError(
                f"{hookpoint}: --distribute-modules expects activations of one row per token, "
                f"got {len(y)} rows of {counts[self.world.rank]} tokens; train it in a run of its own"
            )
        coming = self._exchange.start(y, counts, receivers)
        inputs = coming if x is y else self._exchange.start(x, counts, receivers)
        if coming is not None and inputs is not None:
            self._held.append(Held(hookpoint, inputs, coming))
            if sum(held.y.nbytes for held in self._held) > self._held_bytes:
                self._train(train)

    def end_batch(self, train: Train) -> None:
        self._train(train)
        self._exchange.finish()
        self._counts.popleft()

    def gather(self, own: dict[str, Value]) -> dict[str, Value]:
        every = {name: value for part in self.world.every(own) for name, value in part.items()}
        return {name: every[name] for name in [*self.owner, *every] if name in every}

    @property
    def part(self) -> tuple[int, int]:
        return self.world.rank, self.world.size

    def _train(self, train: Train) -> None:
        for held in self._held:
            y = held.y.wait()
            train(held.hookpoint, y if held.x is held.y else held.x.wait(), y)
        self._held.clear()
