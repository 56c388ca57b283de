"""The training step's parts as Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .auxk import AuxGrads
from .decode import decode_residual as _decode_residual
from .encode import encode
from .latent_grad import LatentGrads, coder_backward, latent_grad
from .step_parts import Batch, Coder, RowGrads, Sink, deliver

__all__ = ["backward", "decode_residual", "encode"]


def decode_residual(
    top_acts: Tensor, top_indices: Tensor, coder: Coder, target: Tensor, dtype: torch.dtype, first_k: int = 0
) -> tuple[Tensor, Tensor]:
    """``x̂ - target`` [N, E] and its squared error []; with ``first_k`` [2, N, E] and [2]."""
    W_dec = coder.W_dec if coder.low_W_dec is None else coder.low_W_dec
    out = _decode_residual(top_acts, top_indices, W_dec, coder.b_dec, target, dtype, first_k=first_k or None)
    return out.residual, out.sse.sum((-2, -1))


def backward(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """Gradient rows to ``sink``; d_bias [L] and ``W_encᵀ d_bias`` [D]."""
    grads = _grads(batch, coder.W_dec if coder.low_W_dec is None else coder.low_W_dec)
    block = RowGrads(0, len(coder.bias), grads.dW_enc, grads.db_enc, grads.dW_dec)
    return deliver([block], coder, aux, sink)


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
