"""The ground truth: every public function in plain PyTorch, differentiated by autograd.

Shapes: N tokens, D width, L latents, K active latents.

Slow and dense (``[N, L]`` in memory) on purpose: this file is what the kernels are tested against, and
it is meant to be read in one sitting. Arithmetic is float32, or float64 where ``x`` is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    top_acts: Tensor
    """Activations of the selected latents, [N, K]; float32 (float64 for float64 input), never negative."""

    top_indices: Tensor
    """Which latents they are, [N, K], int64. For ``topk``: larger activation first; equal ones, smaller index first."""

    pre_acts: Tensor | None
    """ReLU of all scores, [N, L], where asked for; else None."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is summed in float32."""
    return torch.promote_types(dtype, torch.float32)


def center(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """``x - b_dec``, subtracted in the accumulator's dtype and rounded once to ``x.dtype``; [N, D]."""
    if b_dec is None:
        return x
    b_dec = b_dec.to(accumulator_dtype(x.dtype))
    if torch.is_grad_enabled() and (x.requires_grad or b_dec.requires_grad):
        return (x.to(b_dec.dtype) - b_dec).to(x.dtype)
    return torch.sub(x, b_dec, out=torch.empty_like(x))  # the same without a wide copy of x


def scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x weightᵀ + bias``: operands rounded to ``x.dtype``, summed in the accumulator's dtype; [N, L]."""
    acc = accumulator_dtype(x.dtype)
    return torch.nn.functional.linear(x.to(acc), weight.to(x.dtype).to(acc), bias.to(acc))


def select(pre_acts: Tensor, k: int, activation: str = "topk") -> Tensor:
    """Indices [N, K] of the selected entries of ``pre_acts`` [N, L] (already non-negative).

    ``topk``: the k largest, larger first, equal ones by smaller index, NaN above everything.
    ``groupmax``: the largest of each of k contiguous groups of L / k, in the groups' order.
    """
    pre_acts = pre_acts.masked_fill(pre_acts.isnan(), torch.nan)  # CUDA's sort tells NaN of both signs apart
    if activation == "groupmax":
        groups = pre_acts.unflatten(-1, (k, -1))
        first = torch.arange(0, pre_acts.shape[-1], groups.shape[-1], device=pre_acts.device)
        return groups.sort(dim=-1, descending=True, stable=True).indices[..., 0] + first
    return pre_acts.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def topk_encode(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    k: int,
    *,
    b_dec: Tensor | None = None,  # [D]
    activation: str = "topk",
    latent_mask: Tensor | None = None,  # bool [L]
    return_pre_acts: bool = False,
) -> EncoderOutput:
    """Twin of :func:`fastsae_kernels.topk_encode`: ``TopK(ReLU((x - b_dec) weightᵀ + bias))``."""
    pre_acts = scores(center(x, b_dec), weight, bias).relu()
    if latent_mask is not None:
        pre_acts = pre_acts.masked_fill(~latent_mask, 0.0)
    top_indices = select(pre_acts.detach(), k, activation)
    return EncoderOutput(pre_acts.gather(-1, top_indices), top_indices, pre_acts if return_pre_acts else None)


def batch_topk_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, b_dec: Tensor | None = None) -> EncoderOutput:
    """Twin of :func:`fastsae_kernels.batch_topk_encode`: the N·k largest of all N·L, by one stable sort."""
    pre_acts = scores(center(x, b_dec), weight, bias).relu()
    first = pre_acts.detach().flatten().sort(descending=True, stable=True).indices[: len(x) * k]
    kept = torch.zeros_like(pre_acts, dtype=torch.bool)
    kept.view(-1)[first] = True
    return _varying(pre_acts, kept, k)


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, k: int, *, b_dec: Tensor | None = None
) -> EncoderOutput:
    """Twin of :func:`fastsae_kernels.threshold_encode`: what is above ``threshold``, by looking at all N·L."""
    pre_acts = scores(center(x, b_dec), weight, bias).relu()
    return _varying(pre_acts, ~(pre_acts <= threshold), k)


def _varying(pre_acts: Tensor, kept: Tensor, k: int) -> EncoderOutput:  # [N, L], bool [N, L]
    """The kept activations above 0, larger first, in 2k slots, doubled until every token's fit; the rest is 0."""
    acts = pre_acts.masked_fill(~kept, 0.0)
    most, width = int((acts != 0).sum(1).amax()) if len(acts) else 0, 2 * k
    while width < most:
        width *= 2
    indices = select(acts.detach(), min(width, acts.shape[1]))
    return EncoderOutput(acts.gather(1, indices), indices, None)


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K]
    W_dec: Tensor,  # [L, D]
    b_dec: Tensor | None = None,  # [D]
) -> Tensor:
    """Twin of :func:`fastsae_kernels.sparse_decode`: ``Σ_j top_acts[:, j] W_dec[top_indices[:, j]] + b_dec``."""
    acc = accumulator_dtype(W_dec.dtype)
    dense = torch.zeros(len(top_acts), len(W_dec), dtype=acc, device=W_dec.device)
    out = dense.scatter_add(1, top_indices.long(), top_acts.to(acc)) @ W_dec.to(acc)
    if b_dec is not None:
        out = out + b_dec.to(acc)
    return out.to(W_dec.dtype)
