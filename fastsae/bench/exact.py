"""The operations in float64, in chunks of tokens.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**24  # float64 numbers at a time: 128 MiB


def chunks(rows: int, numbers_per_row: int) -> Iterator[slice]:
    size = max(1, CHUNK // numbers_per_row)
    return (slice(start, start + size) for start in range(0, rows, size))


def dots(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``rows[n] · table[indices[n, j]]``, [N, K]."""
    parts = chunks(len(rows), indices.shape[1] * rows.shape[1])
    return torch.cat([torch.einsum("nd,nkd->nk", rows[i].double(), table[indices[i]].double()) for i in parts])


def weighted_sum(acts: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``Σ_j acts[n, j] table[indices[n, j]]``, [N, D]."""
    parts = chunks(len(acts), indices.shape[1] * table.shape[1])
    return torch.cat([torch.einsum("nk,nkd->nd", acts[i].double(), table[indices[i]].double()) for i in parts])


def by_latent(values: Tensor, indices: Tensor, rows: Tensor, num_latents: int) -> Tensor:
    """``Σ values[n, j] rows[n]`` over ``indices[n, j] = l``, [L, D]."""
    out = torch.zeros(num_latents, rows.shape[1], dtype=torch.float64, device=rows.device)
    for i in chunks(len(rows), indices.shape[1] * rows.shape[1]):
        pairs = torch.einsum("nk,nd->nkd", values[i].double(), rows[i].double())
        out.index_add_(0, indices[i].flatten(), pairs.flatten(0, 1))
    return out


def count(values: Tensor, indices: Tensor, num_latents: int) -> Tensor:
    """``Σ values[n, j]`` over ``indices[n, j] = l``, [L]."""
    out = torch.zeros(num_latents, dtype=torch.float64, device=values.device)
    return out.index_add_(0, indices.flatten(), values.double().flatten())
