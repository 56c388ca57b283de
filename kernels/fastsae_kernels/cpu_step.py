"""The latent-major backward on a CPU, a block of latents at a time, so that an optimizer can follow while it is warm.

Shapes: N tokens, D width in, E width out, L latents, K slots per token, P pairs with an activation.

Each block's gradients are one ``embedding_bag`` per matrix over the block's share of the index; they live in a few
megabytes that stay in cache until the block's rows are updated. No [L, D] temporary is made, ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import dense_step
from .auxk import AuxGrads
from .cpu import decode, encode
from .cpu_sampled import ragged_products
from .reference import accumulator_dtype, center
from .step_parts import Batch, Coder, RowGrads, Sink, deliver

__all__ = ["backward", "center", "decode_residual", "encode"]

BLOCK_BYTES = 6 * 2**20
"""Of one matrix's gradient rows: with its weights and moments they fill a share of the last-level cache."""


def decode_residual(
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K]
    coder: Coder,
    target: Tensor,  # [N, E]
    dtype: torch.dtype,  # of what the residual is rounded to
    first_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """``x̂ - target`` [N, E] and its squared error []; with ``first_k`` [2, N, E] and [2]: the first slots, then all."""
    acc = accumulator_dtype(target.dtype)
    W_dec, b_dec, target = coder.W_dec.to(acc), coder.b_dec.to(acc), target.to(acc)

    def residual(slots: slice) -> Tensor:
        return decode(top_acts[:, slots].contiguous(), top_indices[:, slots].contiguous(), W_dec, None)

    if first_k:
        head = residual(slice(0, first_k))
        out = torch.stack([head, head + residual(slice(first_k, None))])
    else:
        out = residual(slice(None))
    out += b_dec
    out -= target
    sse = torch.linalg.vector_norm(out, dim=-1).square_().sum(-1)
    return out.to(dtype).to(acc), sse


def backward(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """Gradient rows to ``sink``; d_bias [L] and ``W_encᵀ d_bias`` [D]."""
    grad = batch.residual.to(batch.scale.dtype).mul_(batch.scale)
    W_dec = coder.W_dec.to(grad.dtype)
    if dense_step.pays(len(W_dec), batch.top_acts.shape[1], grad.device):
        wide = replace(batch, x=batch.x.to(grad.dtype), top_acts=batch.top_acts.to(grad.dtype))
        blocks = dense_step.row_grads(wide, grad, dense_step.act_grads(wide, grad, W_dec))
    else:
        blocks = _row_grads(batch, grad, _act_grads(batch, grad, W_dec))
    return deliver(blocks, coder, aux, sink)


def _act_grads(batch: Batch, grad: Tensor, W_dec: Tensor) -> Tensor:
    """``<grad_n, W_dec[top_indices[n, j]]>``, 0 where the activation is 0; [N, K]."""
    active, k = batch.top_acts != 0, batch.first_k
    products = torch.zeros_like(batch.top_acts, dtype=grad.dtype)
    for rows, slots in zip(grad, (slice(0, k), slice(k, None)), strict=True) if k else [(grad, slice(None))]:
        used = active[:, slots]
        columns = batch.top_indices[:, slots][used]
        if len(columns):
            products[:, slots][used] = ragged_products(rows, W_dec, columns, used.sum(1))
    return products


def _row_grads(batch: Batch, grad: Tensor, act_grads: Tensor) -> Iterator[RowGrads]:
    """The gradients of all latents, in blocks, in ascending order; each block is new memory."""
    offsets, K = batch.index.offsets, batch.top_acts.shape[1]
    num_latents, x = len(offsets) - 1, batch.x.to(grad.dtype)
    pairs = batch.index.pairs[: int(offsets[-1])]
    tokens, latents = pairs // K, batch.top_indices.flatten()[pairs]
    acts, slopes = batch.top_acts.flatten()[pairs].to(grad.dtype), act_grads.flatten()[pairs]
    sources = tokens + len(x) * (pairs % K >= batch.first_k) if batch.first_k else tokens
    table = grad.flatten(0, -2)
    size = max(1, BLOCK_BYTES // (x.element_size() * max(x.shape[1], grad.shape[-1])))
    bounds = [*offsets[:-1:size].tolist(), len(pairs)]
    for i, begin in enumerate(range(0, num_latents, size)):
        end, part = min(begin + size, num_latents), slice(bounds[i], bounds[i + 1])
        starts = offsets[begin:end] - part.start
        yield RowGrads(
            begin,
            end,
            dW_enc=embedding_bag(tokens[part], x, starts, per_sample_weights=slopes[part], mode="sum"),
            db_enc=x.new_zeros(end - begin).index_add_(0, latents[part] - begin, slopes[part]),
            dW_dec=embedding_bag(sources[part], table, starts, per_sample_weights=acts[part], mode="sum"),
        )
