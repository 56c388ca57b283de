"""Sums over a latent's (token, slot) pairs, in registers: what the latent-major kernels have in common.

Shapes: N tokens, D width, K slots per token, C chunks (see :mod:`.by_latent`).
"""
# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, rows, mask_p, offs_d, mask_d, D):
    """``[BLOCK_P, BLOCK_D]`` of a matrix that other latents will want again soon, as float32."""
    mask = mask_p[:, None] & mask_d[None, :]
    tile = tl.load(ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0, eviction_policy="evict_last")
    return tile.to(tl.float32)


@triton.jit
def add_chunks(
    dW_dec, dW_enc, db_enc,  # [BLOCK_D], [BLOCK_D], []
    chunk, chunk_end,
    part_dec_ptr, part_enc_ptr, part_db_ptr,  # [C, D], [C, D], [C]; None: that side is not asked for
    offs_d, mask_d, D: tl.constexpr,
):  # fmt: skip
    """The sums plus the partial rows of a hot latent's full chunks, in order."""
    while chunk < chunk_end:
        if part_dec_ptr is not None:
            dW_dec += tl.load(part_dec_ptr + chunk * D + offs_d, mask=mask_d, other=0.0)
        if part_enc_ptr is not None:
            dW_enc += tl.load(part_enc_ptr + chunk * D + offs_d, mask=mask_d, other=0.0)
            db_enc += tl.load(part_db_ptr + chunk)
        chunk += 1
    return dW_dec, dW_enc, db_enc


@triton.jit
def _add_some(
    dW_dec, dW_enc, db_enc, begin, end, pairs_ptr, acts_ptr, grad_ptr, scale, x_ptr, W_row, d_acts_ptr,
    N, offs_d, mask_d, D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of the BLOCK_P pairs from ``begin``."""
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = begin + offs_p < end
    pair = tl.load(pairs_ptr + begin + offs_p, mask=mask_p, other=0)
    token = pair // K
    if grad_ptr is not None:
        grad_row = token
        if FIRST_K > 0:
            grad_row += tl.where(pair % K >= FIRST_K, N.to(tl.int64), 0)
        grad = _load_rows(grad_ptr, grad_row, mask_p, offs_d, mask_d, D)
        act = tl.load(acts_ptr + pair, mask=mask_p, other=0.0).to(tl.float32)
        dW_dec += tl.sum((act * scale)[:, None] * grad, axis=0)
    if W_row is not None:
        d_act = tl.sum(grad * W_row[None, :], axis=1) * scale
        if d_acts_ptr is not None:
            tl.store(d_acts_ptr + pair, d_act, mask=mask_p)
    elif x_ptr is not None:
        d_act = tl.load(d_acts_ptr + pair, mask=mask_p, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = _load_rows(x_ptr, token, mask_p, offs_d, mask_d, D)
        dW_enc += tl.sum(d_act[:, None] * x, axis=0)
        db_enc += tl.sum(d_act, axis=0)
    return dW_dec, dW_enc, db_enc


@triton.jit
def add_pairs(
    dW_dec, dW_enc, db_enc,  # [BLOCK_D], [BLOCK_D], []
    begin, end, pairs_ptr,
    acts_ptr, grad_ptr, scale, x_ptr,  # grad_ptr None: no decoder side; x_ptr None: no encoder side
    W_row,  # [BLOCK_D]; None: d_acts are given
    d_acts_ptr,  # [N, K]: read if W_row is None, else written; None: neither
    N, offs_d, mask_d,
    D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums plus what the pairs ``begin ... end - 1`` of the index add, BLOCK_P at a time.

    With STAGES > 0 rows are on their way to shared memory that many iterations ahead.
    """
    if STAGES > 0:
        for at in tl.range(begin, end, BLOCK_P, num_stages=STAGES):
            dW_dec, dW_enc, db_enc = _add_some(
                dW_dec, dW_enc, db_enc, at, end, pairs_ptr, acts_ptr, grad_ptr, scale, x_ptr, W_row, d_acts_ptr,
                N, offs_d, mask_d, D, K, FIRST_K, BLOCK_P,
            )  # fmt: skip
    else:
        while begin < end:
            dW_dec, dW_enc, db_enc = _add_some(
                dW_dec, dW_enc, db_enc, begin, end, pairs_ptr, acts_ptr, grad_ptr, scale, x_ptr, W_row, d_acts_ptr,
                N, offs_d, mask_d, D, K, FIRST_K, BLOCK_P,
            )  # fmt: skip
            begin += BLOCK_P
    return dW_dec, dW_enc, db_enc
