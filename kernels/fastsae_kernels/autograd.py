"""The differentiable public functions: :func:`topk_encode`, :func:`sparse_decode`.

Shapes: N tokens, D width, L latents, K active latents.

Each is a ``torch.autograd.Function`` over the primitives of :mod:`.operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators, reference
from .operators import backend
from .reference import EncoderOutput


class TopKEncode(torch.autograd.Function):
    """``acts, indices = TopK(ReLU((x - b_dec) weightᵀ + bias))``, differentiable in x, weight, bias and b_dec.

    A selected latent whose activation is 0 gets no gradient (ReLU's mask). b_dec needs no gather of its own:
    its gradient is ``-weightᵀ d_bias``.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, b_dec, latent_mask, k, activation, impl):
        centered = reference.center(x, b_dec)
        top_acts, top_indices = operators.encode(centered, weight, bias, latent_mask, k, activation, impl)
        return keep_selection(ctx, centered, weight, bias, b_dec, top_acts, top_indices, impl)

    @staticmethod
    def backward(ctx, d_acts, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *selection_grads(ctx, d_acts), None, None, None, None


def keep_selection(ctx, centered, weight, bias, b_dec, top_acts, top_indices, impl) -> tuple[Tensor, Tensor]:
    """End of an encoder's forward: the selection, kept for :func:`selection_grads`."""
    ctx.save_for_backward(centered, weight, top_acts, top_indices)
    ctx.bias_dtype, ctx.b_dec_dtype, ctx.impl = bias.dtype, None if b_dec is None else b_dec.dtype, impl
    ctx.mark_non_differentiable(top_indices)
    return top_acts, top_indices


def selection_grads(ctx, d_acts: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and b_dec, the first four inputs, where they are asked for."""
    centered, weight, top_acts, top_indices = ctx.saved_tensors
    d_acts = d_acts.masked_fill(top_acts <= 0, 0.0)  # [N, K]
    dx = d_weight = d_bias = d_b_dec = None
    if ctx.needs_input_grad[0]:
        dx = operators.decode(d_acts, top_indices, weight, None, ctx.impl).to(centered.dtype)
    if any(ctx.needs_input_grad[1:4]):
        # a frozen weight: no [L, D] gradient; a width of 1 leaves the biases' sums as they are
        x = centered if ctx.needs_input_grad[1] else centered.new_ones((len(centered), 1))
        d_weight, d_bias = operators.encode_backward(d_acts, top_indices, x, weight.shape[0], ctx.impl)
        if ctx.needs_input_grad[3]:
            d_b_dec = -(d_bias @ weight.to(d_bias.dtype)).to(ctx.b_dec_dtype)
        d_weight = d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = d_bias.to(ctx.bias_dtype)
    return dx, d_weight, d_bias, d_b_dec


class SparseDecode(torch.autograd.Function):
    """``out = Σ_j acts[:, j] W_dec[indices[:, j]]``, differentiable in acts and W_dec."""

    @staticmethod
    def forward(ctx, top_acts, top_indices, W_dec, impl):
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        ctx.impl = impl
        return operators.decode(top_acts, top_indices, W_dec, None, impl)

    @staticmethod
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        top_acts, top_indices, W_dec = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            d_acts, d_W_dec = operators.decode_backward(grad_out.contiguous(), top_acts, top_indices, W_dec, ctx.impl)
            return d_acts if ctx.needs_input_grad[0] else None, None, d_W_dec.to(W_dec.dtype), None
        # a frozen decoder: no [L, D] gradient, no index
        d_acts = operators.act_grad(grad_out.contiguous(), top_indices, W_dec, ctx.impl)
        return d_acts.to(top_acts.dtype), None, None, None


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
    implementation: str = "triton",
) -> EncoderOutput:
    """``TopK(ReLU((x - b_dec) weightᵀ + bias))`` (Gao et al. 2024, arXiv 2406.04093, eq. 1), exact.

    The product is computed in ``x.dtype`` (the weights are rounded to it) with float32 accumulation, or
    in float64. Equal activations: the smaller index first. A row with fewer than k positive activations
    is filled up with zeros at the smallest indices that are left; NaN ranks above everything, so that it
    reaches the loss. Latents outside ``latent_mask`` count as 0. ``activation="groupmax"`` takes the
    largest of each of k contiguous groups instead. ``return_pre_acts`` makes the dense [N, L] matrix.

    Raises ``ValueError`` where shapes, dtypes or k do not fit.
    """
    _check_encode(x, weight, bias, k, b_dec, activation, latent_mask)
    if implementation == "reference":
        return reference.topk_encode(
            x, weight, bias, k,
            b_dec=b_dec, activation=activation, latent_mask=latent_mask, return_pre_acts=return_pre_acts,
        )  # fmt: skip
    backend(implementation)
    if return_pre_acts:  # dense anyway: autograd differentiates both outputs
        pre_acts = reference.scores(reference.center(x, b_dec), weight, bias).relu()
        allowed = pre_acts if latent_mask is None else pre_acts.masked_fill(~latent_mask, 0.0)
        top_indices = operators.select(allowed.detach(), k, activation, implementation)
        return EncoderOutput(allowed.gather(-1, top_indices), top_indices, allowed)
    top_acts, top_indices = TopKEncode.apply(x, weight, bias, b_dec, latent_mask, k, activation, implementation)
    return EncoderOutput(top_acts, top_indices, None)


def sparse_decode(
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K]
    W_dec: Tensor,  # [L, D]
    b_dec: Tensor | None = None,  # [D]
    *,
    implementation: str = "triton",
) -> Tensor:
    """``Σ_j top_acts[:, j] W_dec[top_indices[:, j]] + b_dec``: [N, D] in W_dec's dtype, summed in float32.

    ``top_indices`` may be int32 or int64 and must lie in [0, L); repeated indices add up.
    Raises ``ValueError`` where shapes do not fit.
    """
    if top_acts.shape != top_indices.shape or top_acts.ndim != 2 or W_dec.ndim != 2:
        raise ValueError(
            "sparse_decode: expected top_acts [N, K], top_indices [N, K], W_dec [L, D], "
            f"got {list(top_acts.shape)}, {list(top_indices.shape)}, {list(W_dec.shape)}"
        )
    if implementation == "reference":
        return reference.sparse_decode(top_acts, top_indices, W_dec, b_dec)
    backend(implementation)
    out = SparseDecode.apply(top_acts, top_indices, W_dec, implementation)
    return out if b_dec is None else out + b_dec.to(out.dtype)


def _check_encode(x, weight, bias, k, b_dec, activation, latent_mask) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "topk_encode: expected x [N, D], weight [L, D], bias [L], "
            f"got {list(x.shape)}, {list(weight.shape)}, {list(bias.shape)}"
        )
    num_latents = weight.shape[0]
    if not 1 <= k <= num_latents:
        raise ValueError(f"topk_encode: expected 1 <= k <= number of latents ({num_latents}), got k = {k}")
    if activation not in ("topk", "groupmax"):
        raise ValueError(f"topk_encode: expected activation 'topk' or 'groupmax', got {activation!r}")
    if activation == "groupmax" and num_latents % k:
        raise ValueError(f"topk_encode: groupmax needs latents divisible by k, got {num_latents} latents, k = {k}")
    if b_dec is not None and b_dec.shape != x.shape[1:]:
        raise ValueError(f"topk_encode: expected b_dec [{x.shape[1]}], got {list(b_dec.shape)}")
    if latent_mask is not None and (latent_mask.dtype != torch.bool or latent_mask.shape != bias.shape):
        raise ValueError(
            f"topk_encode: expected latent_mask bool [{num_latents}], got {latent_mask.dtype} {list(latent_mask.shape)}"
        )
