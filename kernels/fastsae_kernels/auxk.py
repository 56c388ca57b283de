"""AuxK: what dead latents alone make of the residual, and the gradients of that, by dense products.

Shapes: N tokens, D width in, E width out, R dead latents, n tokens of a block.

A sparse gather would move 5·N·k_aux·E numbers with k_aux about E/2; dense products over the gathered dead rows win
unless there are over ~150·k_aux of them. Nothing of size [N, L] is made: activations are [n, R], block by block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import split
from .split import Peers

BLOCK = 2**24
"""Activations at a time: 64 MB of float32."""


class AuxGrads(NamedTuple):
    """AuxK's loss and its gradients in the dead latents' rows."""

    loss: Tensor
    """``min(R / k_aux, 1) · Σ ‖ê - e‖² / variance``, a scalar, alpha left out."""

    dead: Tensor  # [R] int64, ascending
    dW_enc: Tensor  # [R, D]
    db_enc: Tensor  # [R]
    dW_dec: Tensor  # [R, E]

    def part(self, rows: slice, begin: int) -> AuxGrads:
        """``rows`` of the gradients alone, latents counted from ``begin``; the loss is the whole one."""
        return AuxGrads(self.loss, self.dead[rows] - begin, self.dW_enc[rows], self.db_enc[rows], self.dW_dec[rows])


def auxk_grads(
    x: Tensor,  # [N, D], what the encoder sees
    residual: Tensor,  # [N, E]: x̂ - target, whose negative is to be explained
    dead: Tensor,  # [R] int64, ascending
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    W_dec: Tensor,  # [L, E]
    k_aux: int,
    variance: Tensor,  # []
    alpha: float,
    peers: Peers | None = None,  # that hold more of the dead latents
    num_dead: int | None = None,  # of all ranks, where there are peers
) -> AuxGrads:
    """Gao et al. 2024, arXiv 2406.04093, appendix A.2: the ``k_aux`` strongest dead latents of every token explain
    ``e = target - x̂`` (not differentiated). Gradients are of ``alpha · loss``, summed in float32 or float64.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    num_dead = len(dead) if num_dead is None else num_dead
    scale = min(num_dead / k_aux, 1.0) / variance.to(acc)
    enc, dec, offset = weight[dead].to(x.dtype).to(acc), W_dec[dead].to(acc), bias[dead].to(acc)
    loss = torch.zeros_like(scale)
    dW_enc, db_enc, dW_dec = torch.zeros_like(enc), torch.zeros_like(offset), torch.zeros_like(dec)
    block = max(1, BLOCK // max(1, num_dead))
    for begin in range(0, len(x), block):
        rows, left = x[begin : begin + block].to(acc), residual[begin : begin + block].to(acc)
        acts = torch.addmm(offset, rows, enc.T).relu_()  # [n, R]
        if peers is None:
            acts = keep_largest(acts, k_aux)
            error = torch.addmm(left, acts, dec)  # ê - e
        else:
            acts = split.keep_largest(acts, k_aux, num_dead, peers)
            error = peers.sum(acts @ dec).add_(left)
        loss += error.square().sum()
        error *= 2 * alpha * scale
        dW_dec.addmm_(acts.T, error)
        d_acts = (error @ dec.T).masked_fill_(acts <= 0, 0.0)
        dW_enc.addmm_(d_acts.T, rows)
        db_enc += d_acts.sum(0)
    return AuxGrads(loss * scale, dead, dW_enc, db_enc, dW_dec)


def keep_largest(acts: Tensor, k: int) -> Tensor:  # [n, R] -> [n, R]
    """``acts`` (not negative) with 0 outside the k largest of each row; of equal ones the smaller columns stay."""
    if acts.shape[1] <= k:
        return acts
    least = acts.topk(k, dim=1).values[:, -1:]
    above, level = acts > least, acts == least
    room = k - above.sum(1, keepdim=True)
    return acts.masked_fill(~(above | (level & (level.cumsum(1) <= room))), 0.0)
