"""The primitives on a CPU, in plain PyTorch: exact, deterministic, no compiler needed.

Shapes: N tokens, D width, L latents, K active latents.

Encoding never holds [N, L]: token chunks of at most SCRATCH bytes are scored and selected from while they are in
cache. Gradients of the two matrices are one ``embedding_bag`` each: a latent's bag holds the tokens that chose
it, in token order, so each row is summed once, in a fixed order, without atomics and without a [N, K, D] tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import cpu_linear, cpu_screen
from .cpu_sampled import sampled_products
from .cpu_screen import screen_stats
from .cpu_select import fill_zeros, largest
from .reference import accumulator_dtype

__all__ = ["decode", "decode_backward", "encode", "encode_backward", "screen_stats", "select"]

SCRATCH = 30 * 2**20  # bytes; glibc reuses blocks below 32 MiB, larger ones are mapped anew and zeroed each time
GATHER = 2**22  # numbers gathered at a time where a 16-bit table is summed in float32


def encode(
    x: Tensor,  # [N, D], centred
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    k: int,
    activation: str = "topk",
    latent_mask: Tensor | None = None,  # bool [L]
    *,
    screen: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Activations and indices, [N, K] each, under the contract of :func:`fastsae_kernels.topk_encode`.

    float32 (float64 for float64 x) throughout; 16-bit operands are rounded first and then widened, which costs a
    float32 copy of the weights. ``screen``: rank in bfloat16 and prove the result (``cpu_screen``); None: where
    that pays. Either way the set is the one that float32 scores select.
    """
    acc = accumulator_dtype(x.dtype)
    weight, bias, x = weight.to(x.dtype).to(acc), bias.to(acc), x.to(acc)
    if activation == "topk" and latent_mask is not None:
        allowed = latent_mask.nonzero()[:, 0]
        if 2 * len(allowed) <= len(weight):  # few, as for dead latents: encode with these alone
            return _encode_subset(x, weight, bias, k, allowed, screen)
    if activation == "topk" and latent_mask is None:
        if screen is None:
            screen = cpu_screen.pays(x, weight, k)
        if screen and acc == torch.float32 and 2 * k <= len(weight):
            return _encode_screened(x, weight, bias, k)
    return _encode_exact(x, weight, bias, k, activation, latent_mask)


def _encode_exact(x, weight, bias, k, activation, latent_mask) -> tuple[Tensor, Tensor]:
    top_acts, top_indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    rows = chunk_rows(x.dtype, len(x), len(weight))
    scratch = cpu_linear.scratch_for(x, weight, rows)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        scores = cpu_linear.scores(x[part], weight, bias, scratch)
        if latent_mask is not None:
            scores.relu_().masked_fill_(~latent_mask, 0.0)
        elif activation == "groupmax":
            scores.relu_()  # in a group without a positive score the first zero wins
        top_acts[part], top_indices[part] = _select(scores, k, activation)
        del scores  # before the next chunk's are made
    return top_acts, top_indices


def _encode_screened(x, weight, bias, k) -> tuple[Tensor, Tensor]:
    rows = chunk_rows(torch.bfloat16, len(x), len(weight))
    top_acts, top_indices, certified = cpu_screen.screened_topk(x, weight, bias, k, rows)
    rest = (~certified).nonzero()[:, 0]
    if len(rest):
        top_acts[rest], top_indices[rest] = _encode_exact(x[rest], weight, bias, k, "topk", None)
    return top_acts, top_indices


def _encode_subset(x, weight, bias, k, allowed, screen) -> tuple[Tensor, Tensor]:
    top_acts, top_indices = x.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64)
    few = min(k, len(allowed))
    if few:
        acts, chosen = encode(x, weight[allowed], bias[allowed], few, screen=screen)
        top_acts[:, :few], top_indices[:, :few] = acts, allowed[chosen]
    return fill_zeros(top_acts, top_indices)


def chunk_rows(dtype: torch.dtype, N: int, num_latents: int) -> int:
    """Tokens per chunk: equal chunks whose scores take at most SCRATCH bytes."""
    most = max(1, SCRATCH // (dtype.itemsize * num_latents))
    return max(1, -(-N // -(-max(1, N) // most)))


def select(pre_acts: Tensor, k: int, activation: str = "topk") -> Tensor:
    """Indices [N, K] int64 of what :func:`reference.select` selects from non-negative ``pre_acts`` [N, L]."""
    return _select(pre_acts, k, activation)[1]


def _select(scores: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Values and indices selected from ``scores`` [n, L], which for ``groupmax`` must not be negative."""
    if activation == "groupmax":
        groups = scores.unflatten(1, (k, -1))
        values, position = groups.max(2)  # the first of equal ones; NaN above everything
        return values, position + torch.arange(0, scores.shape[1], groups.shape[2])
    return largest(scores, k)


def decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``Σ_j top_acts[:, j] W_dec[top_indices[:, j]] + b_dec``: [N, D] in W_dec's dtype, summed in its accumulator's."""
    acc = accumulator_dtype(W_dec.dtype)
    acts = top_acts.to(acc)
    active = acts != 0
    if W_dec.dtype == acc and 2 * int(active.sum()) < acts.numel():  # BatchTopK's and prefixes' empty slots
        starts = active.sum(1).cumsum(0) - active.sum(1)
        out = embedding_bag(top_indices[active], W_dec, starts, per_sample_weights=acts[active], mode="sum")
    elif W_dec.dtype == acc:
        out = embedding_bag(top_indices, W_dec, per_sample_weights=acts, mode="sum")
    else:
        out = torch.empty(len(acts), W_dec.shape[1], dtype=acc)
        rows = max(1, GATHER // max(1, acts.shape[1] * W_dec.shape[1]))
        for start in range(0, len(acts), rows):
            part = slice(start, start + rows)
            out[part] = torch.einsum("nk,nkd->nd", acts[part], W_dec[top_indices[part]].to(acc))
    if b_dec is not None:
        out += b_dec.to(acc)
    return out.to(W_dec.dtype)


def encode_backward(d_acts: Tensor, top_indices: Tensor, x: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    """``dW_enc[l] = Σ d_acts[n, j] x[n]`` and ``db_enc[l] = Σ d_acts[n, j]`` over top_indices[n, j] = l.

    [L, D] and [L] in the accumulator's dtype of x; slots whose d_acts is 0 are left out.
    """
    x = x.to(accumulator_dtype(x.dtype)).contiguous()
    tokens, values, starts, latents = _by_latent(top_indices, d_acts.to(x.dtype), num_latents)
    d_bias = x.new_zeros(num_latents).index_add_(0, latents, values)
    return embedding_bag(tokens, x, starts, per_sample_weights=values, mode="sum"), d_bias


def decode_backward(grad_out: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """``d_acts[n, j] = grad_out[n] · W_dec[top_indices[n, j]]`` of every slot, [N, K] in top_acts' dtype, and
    ``dW_dec[l] = Σ top_acts[n, j] grad_out[n]`` over top_indices[n, j] = l, [L, D] in the accumulator's dtype.
    """
    grad = grad_out.to(accumulator_dtype(W_dec.dtype)).contiguous()
    d_acts = act_grad(grad, top_indices, W_dec)
    tokens, values, starts, _ = _by_latent(top_indices, top_acts.to(grad.dtype), len(W_dec))
    return d_acts.to(top_acts.dtype), embedding_bag(tokens, grad, starts, per_sample_weights=values, mode="sum")


def act_grad(grad_out: Tensor, top_indices: Tensor, W_dec: Tensor) -> Tensor:
    """``d_acts`` of :func:`decode_backward` alone, [N, K] in the accumulator's dtype of W_dec."""
    return sampled_products(grad_out.to(accumulator_dtype(W_dec.dtype)).contiguous(), W_dec, top_indices)


def _by_latent(top_indices: Tensor, values: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots that have a value, by latent, then token: tokens [P], values [P], starts [L], latents [P]."""
    keys = top_indices.int().masked_fill(values == 0, num_latents).flatten()  # int32 sorts twice as fast
    latents, slots = keys.sort(stable=True)
    ends = torch.bincount(latents, minlength=num_latents + 1)[:num_latents].cumsum(0)
    slots = slots[: int(ends[-1])]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return slots // top_indices.shape[1], values.flatten()[slots], starts, latents[: len(slots)]
