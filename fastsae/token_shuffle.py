"""A shuffle buffer of tokens: batches whose activations come from many sequences, not from the few just read.

Shapes: N tokens in, M tokens out, C capacity, D width. It holds activations, so one is needed per hookpoint: C · D
numbers each (and as many again for a transcoder's inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

State = dict[str, Any]


class TokenShuffle:
    """Gives tokens in exchange for tokens, in an order that follows from ``seed`` alone; each comes out at most once.

    While the buffer fills, half of what comes in is kept and half is given at once, so that no step is without
    tokens; when it is full, as many come out as went in, drawn from all that is held. The last C tokens of a run
    stay inside.
    """

    def __init__(self, capacity: int, seed: int = 0):
        self.capacity = capacity
        self._held: tuple[Tensor, ...] = ()
        self._random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._held[0]) if self._held else 0

    def exchange(self, *tokens: Tensor) -> tuple[Tensor, ...]:  # each [N, D] -> each [M, D]
        """Put tokens in, take others out; several tensors (inputs and outputs) are exchanged row by row together."""
        count = len(tokens[0])
        kept = min(self.capacity - len(self), count // 2)
        if kept > 0:
            order = self._permutation(count, tokens[0].device)
            stored = tuple(t[order[:kept]] for t in tokens)
            self._held = tuple(map(torch.cat, zip(self._held, stored, strict=True))) if self._held else stored
            return tuple(t[order[kept:]] for t in tokens)
        if not self._held:
            return tokens
        slots = self._permutation(len(self), tokens[0].device)[:count]
        out = tuple(torch.cat([held[slots], t[len(slots) :]]) for held, t in zip(self._held, tokens, strict=True))
        for held, t in zip(self._held, tokens, strict=True):
            held[slots] = t[: len(slots)]
        return out

    def state_dict(self) -> State:
        """The tokens held and the generator's state, as tensors."""
        return {"held": [t.clone() for t in self._held], "random": self._random.get_state()}

    def load_state_dict(self, state: State, device: torch.device | str = "cpu") -> None:
        """Go on where ``state`` was taken; raises :class:`CheckpointError` where it does not fit in."""
        held = tuple(t.clone().to(device) for t in state["held"])
        if held and len(held[0]) > self.capacity:
            raise CheckpointError(
                f"resume: expected at most {self.capacity} tokens in the shuffle buffer, got {len(held[0])}; "
                "give the capacity that the run started with"
            )
        self._held = held
        self._random.set_state(state["random"])

    def _permutation(self, count: int, device: torch.device) -> Tensor:
        return torch.randperm(count, generator=self._random).to(device)


class TokenShuffles:
    """A :class:`TokenShuffle` of ``capacity`` tokens per hookpoint, all in the same order; with 0 tokens pass through.

    Tokens are exchanged where they are trained on, so only the rank that trains a hookpoint's coders holds any.
    """

    def __init__(self, capacity: int, device: torch.device):
        self._capacity, self._device = capacity, device
        self._by_hookpoint: dict[str, TokenShuffle] = {}

    def exchange(self, hookpoint: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # [N, D], [N, E]
        """(x, y) to train on now; an autoencoder's x is y, and is held once."""
        if not self._capacity:
            return x, y
        buffer = self._by_hookpoint.setdefault(hookpoint, TokenShuffle(self._capacity))
        if x is y:
            (y,) = buffer.exchange(y)
            return y, y
        x, y = buffer.exchange(x, y)
        return x, y

    def state_dict(self) -> dict[str, State]:
        return {name: buffer.state_dict() for name, buffer in self._by_hookpoint.items()}

    def load_state_dict(self, state: dict[str, State]) -> None:
        for name, held in state.items():
            self._by_hookpoint.setdefault(name, TokenShuffle(self._capacity)).load_state_dict(held, self._device)
