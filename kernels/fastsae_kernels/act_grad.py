"""Gradient of the activations: ``d_acts[n, j] = <grad_out_n, W_dec[top_indices[n, j]]>``.

Shapes: N tokens, D width, L latents, K slots per token.

The decoder's kernel with roles exchanged: one program takes BLOCK_K slots of a token and runs along D. Used
where :mod:`.latent_grad` cannot make d_acts on the way (rows too wide for registers) or does not run at all (a
frozen decoder).
"""
# pyright: basic

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import refuse_float64
from .sparse_configs import decode_config


@triton.jit(do_not_specialize=["N"])
def _act_grad_kernel(
    grad_ptr, scale_ptr,  # [N, D] or, with FIRST_K, [2, N, D]; [] or None
    indices_ptr, W_ptr, d_acts_ptr,  # [N, K], [L, D], [N, K]
    N,
    D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    latent = tl.load(indices_ptr + token * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    grad_row = tl.zeros((BLOCK_K,), dtype=tl.int64) + token
    if FIRST_K > 0:
        grad_row += tl.where(offs_k >= FIRST_K, N.to(tl.int64), 0)
    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = mask_k[:, None] & (offs_d < D)[None, :]
        grad = tl.load(grad_ptr + grad_row[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        rows = tl.load(W_ptr + latent[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += grad * rows
    d_acts = tl.sum(acc, axis=1)
    if scale_ptr is not None:
        d_acts *= tl.load(scale_ptr)
    tl.store(d_acts_ptr + token * K + offs_k, d_acts, mask=mask_k)


def act_grad(
    grad_out: Tensor,  # [N, D], or [2, N, D] with first_k: for the slots below first_k, and for the rest
    top_indices: Tensor,  # [N, K], int32 or int64
    W_dec: Tensor,  # [L, D]
    *,
    first_k: int | None = None,
    grad_scale: Tensor | None = None,  # [], float32: multiplies grad_out
) -> Tensor:
    """``d_acts`` [N, K], float32, for every slot. Raises ``ValueError`` for float64."""
    refuse_float64("sparse_decode", grad_out, W_dec)
    (N, K), (L, D) = top_indices.shape, W_dec.shape
    d_acts = grad_out.new_empty((N, K), dtype=torch.float32)
    if N == 0:
        return d_acts
    config = decode_config(D, L, K, W_dec.element_size())
    _act_grad_kernel[(N, triton.cdiv(K, config.BLOCK_K))](
        grad_out.contiguous(), grad_scale, top_indices.contiguous(), W_dec.contiguous(), d_acts, N,
        D=D, K=K, FIRST_K=first_k or 0,
        BLOCK_K=config.BLOCK_K, BLOCK_D=config.BLOCK_D, num_warps=config.num_warps,
    )  # fmt: skip
    return d_acts
