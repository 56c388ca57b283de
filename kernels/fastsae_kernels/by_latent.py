"""The latent -> token index: which (token, slot) pairs each latent has, built once per batch.

Shapes: N tokens, L latents, K slots per token, P = N · K pairs, C chunks.

Pair ``n · K + j`` is slot j of token n. A stable sort by latent id puts each latent's pairs side by side, tokens
ascending: a fixed order, so that sums over it are bitwise reproducible. All of it is plain torch without a
host sync. A hot latent (some fire on most tokens) would keep one program busy long after the others: its
full chunks of ``split`` pairs become programs of their own, and only the remainder, fewer than ``split`` pairs,
is left to the latent's program. There are at most ``P // split`` full chunks, known on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SPLIT = 64
MAX_CHUNKS = 8192


class LatentIndex(NamedTuple):
    """The pairs of each latent. All tensors int64: P and every address may pass 2³¹."""

    pairs: Tensor
    """[P]: pair ids ordered by latent, then token, then slot; pairs left out come last."""

    offsets: Tensor
    """[L + 1]: latent l has ``pairs[offsets[l]:offsets[l + 1]]``; ``offsets.diff()`` counts them."""

    chunk_offsets: Tensor
    """[L + 1]: the first ``(chunk_offsets[l + 1] - chunk_offsets[l]) * split`` pairs of latent l are full chunks."""

    chunk_latents: Tensor
    """[C = P // split]: whose chunk it is; L for the unused ones at the end."""

    split: int
    """Pairs per chunk: ``SPLIT``, or more where there would be over ``MAX_CHUNKS`` chunks."""


def by_latent(
    top_indices: Tensor,  # [N, K], int32 or int64
    top_acts: Tensor | None,  # [N, K]: pairs where it is 0 are left out (NaN stays)
    num_latents: int,
) -> LatentIndex:
    """Build the index. Raises ``ValueError`` if the latents' ids do not fit into int32."""
    if num_latents >= 2**31:
        raise ValueError(f"by_latent: expected fewer than 2³¹ latents (ids are sorted as int32), got {num_latents}")
    latents = top_indices.flatten().to(torch.int32)
    if top_acts is not None:
        latents = latents.masked_fill(top_acts.flatten() == 0, num_latents)
    sorted_latents, pairs = latents.sort(stable=True)
    boundaries = torch.arange(num_latents + 1, dtype=torch.int32, device=latents.device)
    offsets = torch.searchsorted(sorted_latents, boundaries)

    split = chunk_size(latents.numel())
    full_chunks = offsets.diff() // split
    chunk_offsets = torch.nn.functional.pad(full_chunks.cumsum(0), (1, 0))
    chunks = torch.arange(latents.numel() // split, device=latents.device)
    chunk_latents = torch.searchsorted(chunk_offsets, chunks, right=True) - 1
    return LatentIndex(pairs, offsets, chunk_offsets, chunk_latents, split)


def chunk_size(num_pairs: int) -> int:
    """SPLIT, doubled until at most MAX_CHUNKS chunks are possible: their partial rows must not grow with N."""
    split = SPLIT
    while num_pairs // split > MAX_CHUNKS:
        split *= 2
    return split
