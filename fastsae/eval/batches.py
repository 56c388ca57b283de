"""Sequences as they go through the model, with the tokens that count.

Shapes: B sequences, S tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..batches import prepare
from ..collation import collate
from ..placement import entry_device


class Batch(NamedTuple):
    """Sequences on the model's device."""

    input_ids: Tensor
    """int64 [B, S]."""
    attention_mask: Tensor | None
    """int64 [B, S], what the model is given; None where all tokens are real."""
    kept: Tensor | None
    """bool [B, S]: tokens that are measured and replaced; None where all are."""

    @property
    def attended(self) -> Tensor | None:  # bool [B, S]
        """Tokens that are real; None where all are."""
        return None if self.attention_mask is None else self.attention_mask.bool()


def read_batches(rows: Any, batch_size: int, model: Any, exclude_tokens: Sequence[int] = ()) -> Iterator[Batch]:
    """Rows of ``input_ids``, and ``attention_mask`` where they have one, in their order, on the model's device."""
    excluded = torch.tensor(exclude_tokens, dtype=torch.int64)
    vocabulary = model.get_input_embeddings().num_embeddings
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
        ready = prepare(batch, excluded, vocabulary, entry_device(model))
        kept = None
        if ready.positions is not None:
            kept = torch.zeros_like(ready.ids, dtype=torch.bool)
            kept.view(-1)[ready.positions] = True
        yield Batch(ready.ids, ready.attention_mask, kept)
