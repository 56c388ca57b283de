"""A step's residuals and backward pass where tokens have several widths, or the loss several prefixes (Matryoshka).

Shapes: N tokens, D width in, E width out, L latents, P prefixes; V rows of W slots each.

Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): prefix p reconstructs from the active latents below m_p, and the
loss is the mean over prefixes of FVU. A latent in the group between m_(p-1) and m_p is in the prefixes p ... P, so its
gradient is that of an ordinary coder whose residual is ``(r_p + ... + r_P) / P``: the backward pass goes group by
group, each a contiguous range of latents with a residual of its own, and no [N, L] matrix is made.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .auxk import AuxGrads
from .batch_topk import Block
from .by_latent import by_latent
from .reference import accumulator_dtype
from .step_parts import Batch, Coder, Sink


def residuals(
    backend: ModuleType, blocks: list[Block], coder: Coder, goal: Tensor, dtype: torch.dtype, prefixes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """``x̂ - goal`` [N, E] and its squared error []; with ``prefixes`` [P, N, E] and [P]."""
    if not prefixes:
        return _residual(backend, blocks, coder, goal, dtype)
    below = (
        [block._replace(acts=block.acts.masked_fill(block.indices >= end, 0.0)) for block in blocks] for end in prefixes
    )
    each = [_residual(backend, part, coder, goal, dtype) for part in below]
    return torch.stack([residual for residual, _ in each]), torch.stack([sse for _, sse in each])


def _residual(
    backend: ModuleType, blocks: list[Block], coder: Coder, goal: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if blocks[0].tokens is None:
        return backend.decode_residual(blocks[0].acts, blocks[0].indices, coder, goal, dtype)
    parts = [backend.decode_residual(b.acts, b.indices, coder, goal[b.tokens], dtype) for b in blocks]
    residual = torch.empty_like(goal, dtype=parts[0][0].dtype)
    for block, (rows, _) in zip(blocks, parts, strict=True):
        residual[block.tokens] = rows
    return residual, torch.stack([sse for _, sse in parts]).sum(0)


def suffix_means(residual: Tensor) -> Tensor:  # [P, N, E]
    """``(r_p + ... + r_P) / P`` for each p, summed in float32 or wider; in place."""
    total = torch.zeros_like(residual[0], dtype=accumulator_dtype(residual.dtype))
    for p in reversed(range(len(residual))):
        total += residual[p]
        residual[p] = total / len(residual)
    return residual


def backward(
    backend: ModuleType, selection: Block, x: Tensor, residual: Tensor, scale: Tensor, first_k: int,
    coder: Coder, aux: AuxGrads | None, sink: Sink, prefixes: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient rows to ``sink``; d_bias [L], ``W_encᵀ d_bias`` [D], and how many tokens activate each latent, [L].

    ``selection`` has V rows, of the tokens that it names; ``residual`` is [N, E], with ``first_k`` [2, N, E], with
    ``prefixes`` [P, N, E]: each group's.
    """
    rows, acts, indices = selection
    x = x if rows is None else x[rows]
    if not prefixes:
        batch = Batch(by_latent(indices, acts, len(coder.bias)), x, acts, indices, residual[_of(rows)], scale, first_k)
        return *backend.backward(batch, coder, aux, sink), batch.index.offsets.diff()
    biases, counts, through = [], [], torch.zeros_like(coder.b_dec, dtype=scale.dtype)
    bounds = [0] * (len(prefixes) + 1)
    if aux is not None:
        bounds = torch.searchsorted(aux.dead, aux.dead.new_tensor([0, *prefixes])).tolist()
    for p, (begin, end) in enumerate(zip((0, *prefixes), prefixes, strict=False)):
        inside = (indices >= begin) & (indices < end)
        acts_, indices_ = acts.masked_fill(~inside, 0.0), (indices - begin).masked_fill(~inside, 0)
        index = by_latent(indices_, acts_, end - begin)
        batch = Batch(index, x, acts_, indices_, residual[p][_of(rows)], scale, 0)
        dead, part = slice(*bounds[p : p + 2]), sink.part(begin, end)
        aux_part = None if aux is None or dead.start == dead.stop else aux.part(dead, begin)
        try:
            d_bias, of_group = backend.backward(batch, coder.part(begin, end), aux_part, part)
        finally:
            sink.begun |= part.begun
        biases.append(d_bias)
        counts.append(index.offsets.diff())
        through += of_group
    return torch.cat(biases), through, torch.cat(counts)


def _of(rows: Tensor | None) -> Tensor | slice:
    return slice(None) if rows is None else rows
