"""The logit lens: which tokens a latent's direction makes likelier, and which less likely.

Shapes: L latents, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Promoted(NamedTuple):
    """Token ids and the logit that one unit of a latent adds, relative to the vocabulary's mean."""

    up: list[tuple[int, float]]
    down: list[tuple[int, float]]


@torch.no_grad()
def logit_lens(model: Any, directions: Tensor, count: int = 8) -> list[Promoted] | None:  # [L, D]
    """The ``count`` most promoted and most suppressed tokens of each direction, or None where there is no such view.

    The direction goes straight through the unembedding, past the final norm and the layers in between
    (nostalgebraist 2020): a first look, true only of directions in the residual stream. None for a model without
    LM head and for widths other than the residual stream's.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != directions.shape[1]:
        return None
    unembedding = head.weight.float()
    logits = directions.to(unembedding) @ (unembedding - unembedding.mean(0)).T
    return [Promoted(_pairs(row.topk(count)), _pairs(row.topk(count, largest=False))) for row in logits]


def _pairs(top: Any) -> list[tuple[int, float]]:
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
