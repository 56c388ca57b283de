"""The backward pass, latent by latent: d_acts, dW_dec, dW_enc and db_enc in one pass over the index.

Shapes: N tokens, D width, L latents, K slots per token, P = N · K pairs, C chunks (see :mod:`.by_latent`).
For every pair (token n, slot j) of latent l, with g = ∂loss/∂x̂ and x the encoder's (centered) input:

    d_act     = <g_n, W_dec[l]>            dW_enc[l] += d_act · x_n
    dW_dec[l] += act · g_n                 db_enc[l] += d_act

One program owns one latent and keeps its rows in registers, in float32: W_dec[l] is read once, no gradient
is ever added in memory, and latents without pairs get exactly 0. Full chunks of hot latents are summed by
programs of their own into partial rows, added in order before the remainder. Bitwise reproducible.
Rows wider than the registers take slabs of BLOCK_D columns, after :mod:`.act_grad` has made d_acts.
"""
# pyright: basic

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .act_grad import act_grad
from .by_latent import LatentIndex
from .pair_sums import add_chunks, add_pairs
from .sparse_configs import latent_grad_config


class LatentGrads(NamedTuple):
    """What :func:`latent_grad` returns, all float32; None where not asked for."""

    d_acts: Tensor | None  # [N, K]; 0 outside the index
    dW_dec: Tensor | None  # [L, D]
    dW_enc: Tensor | None  # [L, D]
    db_enc: Tensor | None  # [L]


@triton.jit(do_not_specialize=["N", "L", "split"])
def _latent_grad_kernel(
    pairs_ptr, offsets_ptr, chunk_offsets_ptr, chunk_latents_ptr, split,  # the index
    acts_ptr, grad_ptr, scale_ptr,  # [N, K], [N, D] or [2, N, D], []; grad_ptr None: no decoder side
    x_ptr,  # [N, D]; None: no encoder side
    W_ptr,  # [L, D]; None: d_acts are given
    d_acts_ptr,  # [N, K]: read if W_ptr is None, else written; None: neither
    dW_dec_ptr, dW_enc_ptr, db_enc_ptr,  # [L, D], [L, D], [L]; for chunks [C, D], [C, D], [C]
    part_dec_ptr, part_enc_ptr, part_db_ptr,  # [C, D], [C, D], [C], of the chunks
    N, L,
    D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    offs_d = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dW_dec = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dW_enc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    db_enc = tl.zeros((), dtype=tl.float32)
    if CHUNKS:
        latent = tl.load(chunk_latents_ptr + row)
        if latent == L:
            return
        begin = tl.load(offsets_ptr + latent) + (row - tl.load(chunk_offsets_ptr + latent)) * split
        end = begin + split
    else:
        latent = row
        chunk = tl.load(chunk_offsets_ptr + latent)
        chunk_end = tl.load(chunk_offsets_ptr + latent + 1)
        begin = tl.load(offsets_ptr + latent) + (chunk_end - chunk) * split
        end = tl.load(offsets_ptr + latent + 1)
        dW_dec, dW_enc, db_enc = add_chunks(
            dW_dec, dW_enc, db_enc, chunk, chunk_end, part_dec_ptr, part_enc_ptr, part_db_ptr, offs_d, mask_d, D
        )
    W_row = None
    if W_ptr is not None:
        W_row = tl.load(W_ptr + latent * D + offs_d, mask=mask_d, other=0.0, eviction_policy="evict_first")
        W_row = W_row.to(tl.float32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    dW_dec, dW_enc, db_enc = add_pairs(
        dW_dec, dW_enc, db_enc, begin, end, pairs_ptr, acts_ptr, grad_ptr, scale, x_ptr, W_row, d_acts_ptr,
        N, offs_d, mask_d, D, K, FIRST_K, BLOCK_P, STAGES,
    )  # fmt: skip
    if grad_ptr is not None:
        tl.store(dW_dec_ptr + row * D + offs_d, dW_dec, mask=mask_d, eviction_policy="evict_first")
    if x_ptr is not None:
        tl.store(dW_enc_ptr + row * D + offs_d, dW_enc, mask=mask_d, eviction_policy="evict_first")
        tl.store(db_enc_ptr + row, db_enc, mask=slab == 0)


def latent_grad(
    index: LatentIndex,
    shape: tuple[int, int, int, int],  # N, K, L, D
    *,
    grad_out: Tensor | None = None,  # [N, D]: asks for dW_dec; needs top_acts, top_indices, W_dec
    top_acts: Tensor | None = None,  # [N, K]
    top_indices: Tensor | None = None,  # [N, K]
    W_dec: Tensor | None = None,  # [L, D]
    x: Tensor | None = None,  # [N, D]: asks for dW_enc and db_enc
    d_acts: Tensor | None = None,  # [N, K]: given, instead of made from grad_out and W_dec
    return_d_acts: bool = False,
    first_k: int | None = None,
    grad_scale: Tensor | None = None,  # [], float32: multiplies grad_out
) -> LatentGrads:
    """The gradients that the arguments ask for, over the pairs of ``index``.

    ``first_k`` (Multi-TopK): grad_out is [2, N, D], for the slots below ``first_k`` and for the rest.
    """
    N, K, L, D = shape
    config = latent_grad_config(D, max(t.element_size() for t in (grad_out, x) if t is not None))
    made_here = d_acts is None and config.BLOCK_D >= D
    if d_acts is None and not made_here:
        d_acts = act_grad(grad_out, top_indices, W_dec, first_k=first_k, grad_scale=grad_scale)
    elif made_here and return_d_acts:
        d_acts = grad_out.new_zeros((N, K), dtype=torch.float32)

    given = (top_acts, grad_out, grad_scale, x, W_dec if made_here else None, d_acts)
    partials = _new_rows(index.chunk_latents.numel(), grad_out, x)
    grads = _new_rows(L, grad_out, x)
    _launch(config, index, shape, given, partials, partials, first_k, chunks=True)
    _launch(config, index, shape, given, grads, partials, first_k, chunks=False)
    return LatentGrads(d_acts if return_d_acts else None, *grads)


def chunk_partials(
    index: LatentIndex,
    shape: tuple[int, int, int, int],  # N, K, L, D
    grad_out: Tensor,  # [N, D], or [2, N, D] with first_k
    top_acts: Tensor,  # [N, K]
    W_dec: Tensor,  # [L, D]; D must fit into registers
    x: Tensor,  # [N, D]
    first_k: int | None,
    grad_scale: Tensor,  # []
) -> tuple[Tensor | None, ...]:
    """Partial rows of hot latents' full chunks: dW_dec [C, D], dW_enc [C, D], db_enc [C]."""
    config = latent_grad_config(shape[3], max(grad_out.element_size(), x.element_size()))
    partials = _new_rows(index.chunk_latents.numel(), grad_out, x)
    given = (top_acts, grad_out, grad_scale, x, W_dec, None)
    _launch(config, index, shape, given, partials, partials, first_k, chunks=True)
    return partials


def _launch(config, index, shape, given, outputs, partials, first_k, *, chunks: bool) -> None:
    """Run the kernel over all chunks of the index, or over all latents."""
    N, K, L, D = shape
    count = index.chunk_latents.numel() if chunks else L
    if count:
        _latent_grad_kernel[(count, triton.cdiv(D, config.BLOCK_D))](
            *index, *map(_contiguous, given), *outputs, *partials, N, L,
            D=D, K=K, FIRST_K=first_k or 0, CHUNKS=chunks,
            BLOCK_P=config.BLOCK_P, BLOCK_D=config.BLOCK_D, STAGES=config.STAGES, num_warps=config.num_warps,
        )  # fmt: skip


def _new_rows(count: int, grad_out: Tensor | None, x: Tensor | None) -> tuple[Tensor | None, ...]:
    """Unfilled dW_dec, dW_enc [count, D] and db_enc [count] of the sides that are there."""
    dW_dec = None if grad_out is None else grad_out.new_empty((count, grad_out.shape[-1]), dtype=torch.float32)
    if x is None:
        return dW_dec, None, None
    return dW_dec, x.new_empty((count, x.shape[-1]), dtype=torch.float32), x.new_empty(count, dtype=torch.float32)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
