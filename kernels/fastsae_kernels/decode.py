"""Sparse decode: ``out_n = Σ_j top_acts[n, j] · W_dec[top_indices[n, j]] + b_dec``, and its residual.

Shapes: N tokens, D width, L latents, K slots per token, S = D / BLOCK_D slabs.

One program sums one token's slab of BLOCK_D columns, BLOCK_K rows of W_dec in flight. Tokens are the fastest
axis of the grid: all tokens of a slab run together, so that the slab of W_dec is read from memory once and
gathered from L2. Slots are added in a fixed order in float32: results are bitwise reproducible. A slot whose
activation is 0 loads nothing; NaN is not 0 and reaches the output.
"""
# pyright: basic

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_configs import decode_config


class Residual(NamedTuple):
    """What :func:`decode_residual` returns. With ``first_k`` both have a leading axis of 2."""

    residual: Tensor
    """``x̂ - target``, [N, D]; with ``first_k`` [2, N, D]: of the first ``first_k`` slots, then of all."""

    sse: Tensor
    """Σ residual² per token and slab before rounding, float32, [N, S] or [2, N, S]; ``sse.sum()`` is the loss."""


@triton.jit
def _add_slots(acc, begin, end, acts_ptr, indices_ptr, W_ptr, offs_d, mask_d, D, BLOCK_K: tl.constexpr):
    """``acc [BLOCK_K, BLOCK_D]`` plus slots ``begin ... end - 1`` of one token."""
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        act = tl.load(acts_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        latent = tl.load(indices_ptr + offs_k, mask=mask_k, other=0).to(tl.int64)
        mask = (act != 0.0)[:, None] & mask_d[None, :]
        rows = tl.load(W_ptr + latent[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        acc += act[:, None] * rows.to(tl.float32)
    return acc


@triton.jit
def _finish(acc, bias, target_ptr, out_ptr, sse_ptr, offs_d, mask_d):
    """Store ``Σ acc + bias``, or its residual and squared error where there is a target."""
    out = tl.sum(acc, axis=0) + bias
    if target_ptr is not None:
        out -= tl.load(target_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(sse_ptr, tl.sum(out * out, axis=0))  # the padding is 0, or not finite where the token is not
    tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["N"])
def _decode_kernel(
    acts_ptr, indices_ptr, W_ptr, bias_ptr,  # [N, K], [N, K], [L, D], [D] or None
    target_ptr,  # [N, D], or None: store the decoded token instead of the residual
    out_ptr, sse_ptr,  # [N, D] and [N, S], with FIRST_K [2, N, D] and [2, N, S]
    N,
    D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr,  # FIRST_K = 0: no snapshot
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slab, num_slabs = tl.program_id(1), tl.num_programs(1)
    offs_d = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acts_ptr += token * K
    indices_ptr += token * K
    out_ptr += token * D
    if target_ptr is not None:
        target_ptr += token * D
        sse_ptr += token * num_slabs + slab
    bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    if FIRST_K > 0:
        acc = _add_slots(acc, 0, FIRST_K, acts_ptr, indices_ptr, W_ptr, offs_d, mask_d, D, BLOCK_K)
        _finish(acc, bias, target_ptr, out_ptr, sse_ptr, offs_d, mask_d)
        out_ptr += N.to(tl.int64) * D
        sse_ptr += N.to(tl.int64) * num_slabs
    acc = _add_slots(acc, FIRST_K, K, acts_ptr, indices_ptr, W_ptr, offs_d, mask_d, D, BLOCK_K)
    _finish(acc, bias, target_ptr, out_ptr, sse_ptr, offs_d, mask_d)


def decode(
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K], int32 or int64
    W_dec: Tensor,  # [L, D]
    b_dec: Tensor | None,  # [D]
) -> Tensor:
    """Decoded tokens [N, D] in W_dec's dtype, summed in float32; repeated indices add up.

    Raises ``ValueError`` for float64.
    """
    refuse_float64("sparse_decode", top_acts, W_dec)
    out = W_dec.new_empty((top_acts.shape[0], W_dec.shape[1]))
    _launch(top_acts, top_indices, W_dec, b_dec, None, out, None, first_k=0)
    return out


def decode_residual(
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K], int32 or int64
    W_dec: Tensor,  # [L, D]
    b_dec: Tensor | None,  # [D]
    target: Tensor,  # [N, D]
    residual_dtype: torch.dtype,
    *,
    first_k: int | None = None,
) -> Residual:
    """``x̂ - target`` rounded to ``residual_dtype``, and its squared error, in one pass over W_dec's rows.

    ``first_k`` (Multi-TopK, Gao et al. 2024, arXiv 2406.04093): also the residual of the first ``first_k``
    slots alone, a snapshot taken on the way. Raises ``ValueError`` for float64 or ``first_k`` outside [1, K).
    """
    refuse_float64("decode_residual", top_acts, W_dec, target)
    N, K = top_acts.shape
    if first_k is not None and not 1 <= first_k < K:
        raise ValueError(f"decode_residual: expected 1 <= first_k < K = {K}, got {first_k}")
    shape = (N,) if first_k is None else (2, N)
    residual = target.new_empty((*shape, W_dec.shape[1]), dtype=residual_dtype)
    sse = target.new_empty((*shape, _num_slabs(W_dec, K)), dtype=torch.float32)
    _launch(top_acts, top_indices, W_dec, b_dec, target.contiguous(), residual, sse, first_k or 0)
    return Residual(residual, sse)


def refuse_float64(name: str, *tensors: Tensor) -> None:
    """Raise ``ValueError`` naming the way out: the Triton kernels sum in float32."""
    if any(t.dtype == torch.float64 for t in tensors):
        raise ValueError(
            f"{name}: the triton implementation takes float32, bfloat16 or float16, got float64; "
            'use implementation="reference" for float64'
        )


def _num_slabs(W_dec: Tensor, K: int) -> int:
    (L, D) = W_dec.shape
    return triton.cdiv(D, decode_config(D, L, K, W_dec.element_size()).BLOCK_D)


def _launch(top_acts, top_indices, W_dec, b_dec, target, out, sse, first_k: int) -> None:
    (N, K), (L, D) = top_acts.shape, W_dec.shape
    if N == 0:
        return
    config = decode_config(D, L, K, W_dec.element_size())
    _decode_kernel[(N, _num_slabs(W_dec, K))](
        top_acts.contiguous(), top_indices.contiguous(), W_dec.contiguous(),
        None if b_dec is None else b_dec.contiguous(), target, out, sse, N,
        D=D, K=K, FIRST_K=first_k, BLOCK_K=config.BLOCK_K, BLOCK_D=config.BLOCK_D, num_warps=config.num_warps,
    )  # fmt: skip
