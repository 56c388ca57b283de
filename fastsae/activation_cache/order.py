"""A random order of tokens that a disk can follow, any part of which is known without what comes before it.

Shapes: N tokens.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

BLOCK, POOL = 64, 4096


class TokenOrder:
    """The tokens ``begin`` to ``end`` in an order that follows from ``seed``.

    Blocks of ``block`` neighbouring tokens are put in random order, and the tokens of each ``pool`` blocks are
    shuffled among each other: near to a full shuffle. ``block=1`` with a pool of all tokens is a full one.
    """

    def __init__(self, begin: int, end: int, seed: int, block: int = BLOCK, pool: int = POOL):
        self._begin, self._end, self._seed, self._block = begin, end, seed, block
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randperm(-(-(end - begin) // block), generator=generator)
        self._pools = blocks.split(pool) if len(blocks) else ()
        sizes = torch.tensor([len(self._unshuffled(i)) for i in range(len(self._pools))], dtype=torch.int64)
        self._ends = sizes.cumsum(0)  # [pools]: tokens up to the end of each
        self._last: tuple[int, Tensor] | None = None  # the pool used last, shuffled

    def __len__(self) -> int:
        return self._end - self._begin

    def part(self, start: int, stop: int) -> Tensor:  # int64 [stop - start]
        """The tokens at the places ``start`` to ``stop`` of the order."""
        parts = [torch.zeros(0, dtype=torch.int64)]
        while start < (stop := min(stop, len(self))):
            i = int(torch.searchsorted(self._ends, start, right=True))
            tokens, first = self._pool(i), int(self._ends[i - 1]) if i else 0
            parts.append(tokens[start - first : stop - first])
            start = first + len(tokens)
        return torch.cat(parts)

    def _pool(self, i: int) -> Tensor:
        if self._last is None or self._last[0] != i:
            tokens = self._unshuffled(i)
            generator = torch.Generator().manual_seed(random.Random(f"{self._seed}-{i}").getrandbits(63))
            self._last = i, tokens[torch.randperm(len(tokens), generator=generator)]
        return self._last[1]

    def _unshuffled(self, i: int) -> Tensor:
        tokens = (self._begin + self._pools[i][:, None] * self._block + torch.arange(self._block)).flatten()
        return tokens[tokens < self._end]
