"""The training step's parts as Triton kernels, and the backward pass with the optimizer behind it.

Shapes: N tokens, D width, L latents, K slots per token, R dead latents, B blocks of LATENTS latents.

`_latent_step_kernel` sums a latent's gradient rows as :mod:`.latent_grad` does, adds AuxK's where the latent is
dead, and updates both its rows while they are in registers: no [L, D] gradient is written or read. Each program
takes LATENTS latents and leaves one partial row of ``W_encᵀ d_bias``, with the weights as they were.
"""
# pyright: basic

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dense_step
from .auxk import AuxGrads
from .backward import coder_backward
from .center import center
from .decode import decode_residual as _decode_residual
from .encode import encode
from .gpu import gpu_family
from .latent_grad import LatentGrads, chunk_partials, latent_grad
from .pair_sums import add_chunks, add_pairs
from .row_update import CODES, fits, scalars, state_pointers, update, update_row
from .sparse_configs import latent_step_config
from .step_parts import Batch, Coder, RowGrads, RowStep, Sink, deliver

__all__ = ["backward", "center", "decode_residual", "encode"]


@triton.jit(do_not_specialize=["N", "L", "split"])
def _latent_step_kernel(
    pairs_ptr, offsets_ptr, chunk_offsets_ptr, split,  # the index
    acts_ptr, grad_ptr, scale_ptr, x_ptr,  # [N, K], [N, D] or [2, N, D], [], [N, D]
    part_dec_ptr, part_enc_ptr, part_db_ptr,  # partial rows of hot latents' chunks
    aux_row_ptr, aux_dec_ptr, aux_enc_ptr, aux_db_ptr,  # [L] int32: R's row or -1; [R, D], [R, D], [R]; or None
    W_enc_ptr, enc_first_ptr, enc_second_ptr, enc_first_scale_ptr, enc_second_scale_ptr, enc_low_ptr,
    W_dec_ptr, dec_first_ptr, dec_second_ptr, dec_first_scale_ptr, dec_second_scale_ptr, dec_low_ptr,
    db_ptr, through_ptr,  # [L], [B, D]; through_ptr None: not asked for
    N, L, scalars_ptr,  # [6], read in place of the six numbers that follow; None: they are right
    lr, beta1, beta2, eps, correction1, correction2,
    D: tl.constexpr, K: tl.constexpr, FIRST_K: tl.constexpr,
    RULE: tl.constexpr, ENC_UNIT_ROWS: tl.constexpr, DEC_UNIT_ROWS: tl.constexpr,
    LATENTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if scalars_ptr is not None:
        lr, beta1, beta2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
        eps, correction1, correction2 = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5)
    block = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    scale = tl.load(scale_ptr)
    latent = block * LATENTS
    last = tl.minimum(latent + LATENTS, L)
    while latent < last:
        chunk = tl.load(chunk_offsets_ptr + latent)
        chunk_end = tl.load(chunk_offsets_ptr + latent + 1)
        begin = tl.load(offsets_ptr + latent) + (chunk_end - chunk) * split
        end = tl.load(offsets_ptr + latent + 1)
        offs = latent * D + offs_d
        W_dec = tl.load(W_dec_ptr + offs, mask=mask_d, other=0.0, eviction_policy="evict_first")
        W_used = W_dec
        if dec_low_ptr is not None:  # the decoder that was used
            W_used = W_dec.to(dec_low_ptr.dtype.element_ty).to(tl.float32)
        dW_dec = tl.zeros((BLOCK_D,), dtype=tl.float32)
        dW_enc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        db_enc = tl.zeros((), dtype=tl.float32)
        dW_dec, dW_enc, db_enc = add_chunks(
            dW_dec, dW_enc, db_enc, chunk, chunk_end, part_dec_ptr, part_enc_ptr, part_db_ptr, offs_d, mask_d, D
        )
        dW_dec, dW_enc, db_enc = add_pairs(
            dW_dec, dW_enc, db_enc, begin, end, pairs_ptr, acts_ptr, grad_ptr, scale, x_ptr, W_used, None,
            N, offs_d, mask_d, D, K, FIRST_K, BLOCK_P, STAGES,
        )  # fmt: skip
        if aux_row_ptr is not None:
            aux = tl.load(aux_row_ptr + latent).to(tl.int64)
            if aux >= 0:
                dW_dec += tl.load(aux_dec_ptr + aux * D + offs_d, mask=mask_d, other=0.0)
                dW_enc += tl.load(aux_enc_ptr + aux * D + offs_d, mask=mask_d, other=0.0)
                db_enc += tl.load(aux_db_ptr + aux)
        tl.store(db_ptr + latent, db_enc)
        W_dec = update_row(
            W_dec, dW_dec, latent, offs_d, mask_d,
            dec_first_ptr, dec_second_ptr, dec_first_scale_ptr, dec_second_scale_ptr, dec_low_ptr,
            lr, beta1, beta2, eps, correction1, correction2, D, RULE, DEC_UNIT_ROWS, BLOCK_D,
        )  # fmt: skip
        tl.store(W_dec_ptr + offs, W_dec, mask=mask_d, eviction_policy="evict_first")
        W_enc = tl.load(W_enc_ptr + offs, mask=mask_d, other=0.0, eviction_policy="evict_first")
        if through_ptr is not None:  # summed in L2: registers are scarce here
            through = db_enc * W_enc
            if latent > block * LATENTS:
                through += tl.load(through_ptr + block * D + offs_d, mask=mask_d, other=0.0)
            tl.store(through_ptr + block * D + offs_d, through, mask=mask_d)
        W_enc = update_row(
            W_enc, dW_enc, latent, offs_d, mask_d,
            enc_first_ptr, enc_second_ptr, enc_first_scale_ptr, enc_second_scale_ptr, enc_low_ptr,
            lr, beta1, beta2, eps, correction1, correction2, D, RULE, ENC_UNIT_ROWS, BLOCK_D,
        )  # fmt: skip
        tl.store(W_enc_ptr + offs, W_enc, mask=mask_d, eviction_policy="evict_first")
        latent += 1


def decode_residual(
    top_acts: Tensor, top_indices: Tensor, coder: Coder, target: Tensor, dtype: torch.dtype, first_k: int = 0
) -> tuple[Tensor, Tensor]:
    """``x̂ - target`` [N, E] and its squared error []; with ``first_k`` [2, N, E] and [2]."""
    with torch.cuda.device_of(top_acts):
        out = _decode_residual(
            top_acts, top_indices, coder.used_W_dec, coder.b_dec, target, dtype, first_k=first_k or None
        )
    return out.residual, out.sse.sum((-2, -1))


def backward(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """Gradient rows to ``sink``; d_bias [L] and ``W_encᵀ d_bias`` [D]. A RowStep that fits runs in the kernel."""
    with torch.cuda.device_of(batch.x):
        if dense_step.pays(len(coder.bias), batch.top_acts.shape[1], batch.x.device):
            return _dense(batch, coder, aux, sink)
        if isinstance(sink, RowStep) and fits_inside(sink):
            return _fused(batch, coder, aux, sink)
        grads = _grads(batch, coder.used_W_dec)
        block = RowGrads(0, len(coder.bias), grads.dW_enc, grads.db_enc, grads.dW_dec)
        return deliver([block], coder, aux, _kernel_sink(sink))


def _dense(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """By dense products in the residual's precision, summed in float32 by the matrix unit."""
    W_dec = coder.used_W_dec
    slopes = dense_step.act_grads(batch, batch.residual, W_dec.to(batch.residual.dtype)) * batch.scale
    blocks = (
        block._replace(dW_dec=block.dW_dec * batch.scale)
        for block in dense_step.row_grads(batch, batch.residual, slopes)
    )
    return deliver(blocks, coder, aux, _kernel_sink(sink))


class _RowKernel:
    """A RowStep whose rows, once their gradients are in memory, are updated by the kernel."""

    def __init__(self, step: RowStep):
        self.step = step

    def rows(self, begin: int, end: int, dW_enc: Tensor, dW_dec: Tensor) -> None:
        self.step.begun = True
        for matrix, grad in ((self.step.encoder, dW_enc), (self.step.decoder, dW_dec)):
            update(self.step.rule, matrix.part(begin, end), grad, lr=self.step.lr, step=self.step.step)


def _kernel_sink(sink: Sink) -> Sink:
    if isinstance(sink, RowStep) and fits(sink.rule, sink.encoder) and fits(sink.rule, sink.decoder):
        return _RowKernel(sink)
    return sink


def fits_inside(step: RowStep) -> bool:
    """Whether the backward kernel can take the optimizer's step: rows of one width, and registers for them."""
    matrices = (step.encoder, step.decoder)
    return step.encoder.weight.shape == step.decoder.weight.shape and all(fits(step.rule, m) for m in matrices)


def _fused(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: RowStep) -> tuple[Tensor, Tensor]:
    (N, K), (L, D) = batch.top_acts.shape, coder.weight.shape
    config = latent_step_config(D, gpu_family(batch.x.device))
    blocks = triton.cdiv(L, config.LATENTS)
    index, residual, x = batch.index, batch.residual.contiguous(), batch.x.contiguous()
    partials = chunk_partials(
        index, (N, K, L, D), residual, batch.top_acts, coder.used_W_dec, x, batch.first_k, batch.scale
    )
    d_bias = x.new_empty(L, dtype=torch.float32)
    through = x.new_empty((blocks, D), dtype=torch.float32) if coder.centered else None
    aux_rows = (None, None, None, None)
    if aux is not None:
        rows = torch.full((L,), -1, dtype=torch.int32, device=x.device)
        rows[aux.dead] = torch.arange(len(aux.dead), dtype=torch.int32, device=x.device)
        aux_rows = (rows, aux.dW_dec, aux.dW_enc, aux.db_enc)
    sink.begun = True
    _latent_step_kernel[(blocks,)](
        index.pairs, index.offsets, index.chunk_offsets, index.split,
        batch.top_acts.contiguous(), residual, batch.scale, x, *partials, *aux_rows,
        sink.encoder.weight, *state_pointers(sink.encoder), sink.decoder.weight, *state_pointers(sink.decoder),
        d_bias, through, N, L, sink.scalars, *scalars(sink.rule, sink.lr, sink.step),
        D=D, K=K, FIRST_K=batch.first_k, RULE=CODES[sink.rule.name],
        ENC_UNIT_ROWS=sink.encoder.unit_rows, DEC_UNIT_ROWS=sink.decoder.unit_rows,
        LATENTS=config.LATENTS, BLOCK_P=config.BLOCK_P, BLOCK_D=config.BLOCK_D, STAGES=config.STAGES,
        **config.options,
    )  # fmt: skip
    return d_bias, d_bias.new_zeros(()) if through is None else through.sum(0)


def _grads(batch: Batch, W_dec: Tensor) -> LatentGrads:
    options = {"first_k": batch.first_k or None, "grad_scale": batch.scale}
    if batch.x.shape[1] == W_dec.shape[1]:
        return coder_backward(
            batch.residual, batch.top_acts, batch.top_indices, batch.x, W_dec, index=batch.index, **options
        )
    (N, K), (L, E) = batch.top_acts.shape, W_dec.shape  # rows of two widths: one pass each
    decoder = latent_grad(
        batch.index, (N, K, L, E), grad_out=batch.residual, top_acts=batch.top_acts, top_indices=batch.top_indices,
        W_dec=W_dec, return_d_acts=True, **options,
    )  # fmt: skip
    encoder = latent_grad(batch.index, (N, K, L, batch.x.shape[1]), x=batch.x, d_acts=decoder.d_acts)
    return LatentGrads(None, decoder.dW_dec, encoder.dW_enc, encoder.db_enc)
