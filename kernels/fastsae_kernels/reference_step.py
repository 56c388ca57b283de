"""The training step's parts in plain PyTorch, for any device and as the CPU's and the kernels' twin.

Shapes: N tokens, D width in, E width out, L latents, K slots per token.

Gradients of the matrices go through a dense [N, L] matrix of activations: slow on purpose, and easy to read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .auxk import AuxGrads
from .reference import accumulator_dtype, center, scores, select, sparse_decode
from .step_parts import Batch, Coder, RowGrads, Sink, deliver

__all__ = ["backward", "center", "decode_residual", "encode"]


def encode(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str, _mask: None) -> tuple[Tensor, Tensor]:
    """Activations and indices, [N, K] each."""
    pre_acts = scores(x, weight, bias).relu()
    indices = select(pre_acts, k, activation)
    return pre_acts.gather(1, indices), indices


def decode_residual(
    top_acts: Tensor, top_indices: Tensor, coder: Coder, target: Tensor, dtype: torch.dtype, first_k: int = 0
) -> tuple[Tensor, Tensor]:
    """``x̂ - target`` [N, E] and its squared error []; with ``first_k`` [2, N, E] and [2]."""
    acc = accumulator_dtype(target.dtype)
    W_dec, b_dec = coder.W_dec.to(acc), coder.b_dec.to(acc)
    ends = (first_k, top_acts.shape[1]) if first_k else (top_acts.shape[1],)
    out = torch.stack([sparse_decode(top_acts[:, :end], top_indices[:, :end], W_dec, b_dec) for end in ends])
    out -= target.to(acc)
    sse = out.square().sum((-2, -1))
    out = out.to(dtype)
    return (out, sse) if first_k else (out[0], sse[0])


def backward(batch: Batch, coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """Gradient rows to ``sink``; d_bias [L] and ``W_encᵀ d_bias`` [D]."""
    x = batch.x.to(batch.scale.dtype)
    W_dec, grad = coder.W_dec.to(x.dtype), batch.residual.to(x.dtype) * batch.scale
    slots = slice(0, batch.first_k), slice(batch.first_k, None)
    dW_dec, d_scores = torch.zeros_like(W_dec), x.new_zeros(len(x), len(W_dec))
    for rows, part in zip(grad, slots, strict=True) if batch.first_k else [(grad, slice(None))]:
        acts, indices = batch.top_acts[:, part].to(x.dtype), batch.top_indices[:, part].long()
        dense = torch.zeros_like(d_scores).scatter_add_(1, indices, acts)
        dW_dec += dense.T @ rows
        d_scores += (rows @ W_dec.T).masked_fill_(dense == 0, 0.0)
    block = RowGrads(0, len(W_dec), d_scores.T @ x, d_scores.sum(0), dW_dec)
    return deliver([block], coder, aux, sink)
