"""The backward pass by dense products: for coders whose latents fire so often that gathering rows costs more.

Shapes: N tokens, D width in, E width out, L latents, K slots per token, R latents of a block, T rows of the residual
(N, or 2N with first_k).

A block of latents is spread out to a matrix [R, T] of activations and one of slopes [R, N], and its gradients are
two matrix products. Nothing of size [N, L] exists at once. The sparse way costs about K gathered rows per token,
the dense one L multiplied ones; which is cheaper depends on L / K alone (`crossover`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .step_parts import Batch, RowGrads

BLOCK_NUMBERS = 2**23
"""Of a block's spread-out matrix: 32 MB of float32."""

CROSSOVER = {"cpu": 0, "cuda": 64}
"""Latents per active latent below which dense products win. CPU: none; measured (``benchmarks/crossover.py``, N=1024,
D=768, 2 cores of an AMD EPYC): sparse 15.4 ms against 16.9 at L/k = 4, 20.5 against 34.2 at 16, 46.6 against 116.9 at
64. GPU: modelled from FLOPs and bytes of an H100-class card, with room; not measured yet."""


def pays(num_latents: int, num_slots: int, device: torch.device) -> bool:
    """Whether dense products are expected to win; ``FASTSAE_BACKWARD=sparse|dense`` overrides."""
    chosen = os.environ.get("FASTSAE_BACKWARD", "auto")
    if chosen not in ("auto", "sparse", "dense"):
        raise ValueError(f"FASTSAE_BACKWARD: expected auto, sparse or dense, got {chosen!r}")
    if chosen != "auto":
        return chosen == "dense"
    return num_latents < CROSSOVER.get(device.type, 0) * num_slots


def act_grads(batch: Batch, grad: Tensor, W_dec: Tensor) -> Tensor:
    """``<grad_n, W_dec[top_indices[n, j]]>``, 0 where the activation is 0, [N, K]: the products of all, then a pick.

    ``grad`` [N, E], or [2, N, E] with first_k.
    """
    out = torch.empty_like(batch.top_acts, dtype=torch.promote_types(grad.dtype, torch.float32))
    rows = max(1, BLOCK_NUMBERS // len(W_dec))
    slots = [slice(0, batch.first_k), slice(batch.first_k, None)] if batch.first_k else [slice(None)]
    for part_grad, part in zip(grad if batch.first_k else grad[None], slots, strict=True):
        for begin in range(0, len(out), rows):
            tokens = slice(begin, begin + rows)
            products = part_grad[tokens] @ W_dec.T
            out[tokens, part] = products.gather(1, batch.top_indices[tokens, part]).to(out.dtype)
    return out.masked_fill_(batch.top_acts == 0, 0.0)


def row_grads(batch: Batch, grad: Tensor, slopes: Tensor) -> Iterator[RowGrads]:
    """The gradients of all latents, in blocks, in ascending order; ``slopes`` [N, K] is what `act_grads` returns."""
    index, K, acc = batch.index, batch.top_acts.shape[1], slopes.dtype
    N, num_latents, table = len(batch.x), len(index.offsets) - 1, grad.flatten(0, -2)
    size = max(1, min(num_latents, BLOCK_NUMBERS // len(table)))
    for begin in range(0, num_latents, size):
        end = min(begin + size, num_latents)
        inside = (batch.top_indices >= begin) & (batch.top_indices < end) & (batch.top_acts != 0)
        latents = torch.where(inside, batch.top_indices - begin, end - begin)  # others go to a row that is dropped
        tokens = torch.arange(N, device=grad.device)[:, None].expand(-1, K)
        sources = tokens
        if batch.first_k:
            sources = tokens + N * (torch.arange(K, device=grad.device) >= batch.first_k)
        spread = grad.new_zeros(end - begin + 1, len(table))
        spread[latents, sources] = batch.top_acts.to(grad.dtype)
        slope = batch.x.new_zeros(end - begin + 1, N, dtype=grad.dtype)
        slope[latents, tokens] = slopes.to(grad.dtype)
        yield RowGrads(
            begin, end,
            dW_enc=(slope[:-1] @ batch.x.to(grad.dtype)).to(acc),
            db_enc=slope[:-1].sum(1, dtype=acc),
            dW_dec=(spread[:-1] @ table).to(acc),
        )  # fmt: skip
