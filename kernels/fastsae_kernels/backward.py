"""The backward passes of encoding, of decoding, and of both at once, each by one index and :mod:`.latent_grad`.

Shapes: N tokens, D width, L latents, K slots per token. All refuse float64.
"""

from __future__ import annotations

from torch import Tensor

from .by_latent import LatentIndex, by_latent
from .decode import refuse_float64
from .latent_grad import LatentGrads, latent_grad


def decode_backward(
    grad_out: Tensor,  # [N, D]
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K], int32 or int64
    W_dec: Tensor,  # [L, D]
) -> tuple[Tensor, Tensor]:
    """Backward of :func:`.decode.decode`: d_acts [N, K] for every slot, also of zero acts, in top_acts' dtype,
    and dW_dec [L, D] in float32. Raises ``ValueError`` for float64.
    """
    refuse_float64("sparse_decode", grad_out, top_acts, W_dec)
    (N, K), (L, D) = top_acts.shape, W_dec.shape
    grads = latent_grad(
        by_latent(top_indices, None, L), (N, K, L, D),
        grad_out=grad_out, top_acts=top_acts, top_indices=top_indices, W_dec=W_dec, return_d_acts=True,
    )  # fmt: skip
    assert grads.d_acts is not None
    assert grads.dW_dec is not None
    return grads.d_acts.to(top_acts.dtype), grads.dW_dec


def encode_backward(
    d_acts: Tensor,  # [N, K]; 0 where ReLU was at 0
    top_indices: Tensor,  # [N, K], int32 or int64
    x: Tensor,  # [N, D]
    num_latents: int,
) -> tuple[Tensor, Tensor]:
    """Backward of the encoder at fixed indices: dW_enc [L, D] and db_enc [L], both float32.

    Raises ``ValueError`` for float64.
    """
    refuse_float64("topk_encode", d_acts, x)
    (N, D), K = x.shape, d_acts.shape[1]
    grads = latent_grad(by_latent(top_indices, d_acts, num_latents), (N, K, num_latents, D), x=x, d_acts=d_acts)
    assert grads.dW_enc is not None
    assert grads.db_enc is not None
    return grads.dW_enc, grads.db_enc


def coder_backward(
    grad_out: Tensor,  # [N, D], or [2, N, D] with first_k
    top_acts: Tensor,  # [N, K]
    top_indices: Tensor,  # [N, K], int32 or int64
    x: Tensor,  # [N, D], what the encoder saw
    W_dec: Tensor,  # [L, D]
    *,
    return_d_acts: bool = False,
    first_k: int | None = None,
    grad_scale: Tensor | None = None,  # [], float32: multiplies grad_out, e.g. 2 / variance
    index: LatentIndex | None = None,  # of these indices and acts, where the caller has it
) -> LatentGrads:
    """Backward of decode(encode(x)) at fixed indices in one pass: the training step.

    ReLU's mask is the index: a selected latent whose activation is 0 gets no gradient through the encoder, and
    its d_act is 0. ``first_k`` (Multi-TopK): row 0 of grad_out is for the slots below ``first_k`` (the gradients
    of both residuals), row 1 for the rest. Raises ``ValueError`` for float64.
    """
    refuse_float64("coder_backward", grad_out, top_acts, x, W_dec)
    (N, K), (L, D) = top_acts.shape, W_dec.shape
    grads = latent_grad(
        index or by_latent(top_indices, top_acts, L), (N, K, L, D),
        grad_out=grad_out, top_acts=top_acts, top_indices=top_indices, W_dec=W_dec, x=x,
        return_d_acts=return_d_acts, first_k=first_k, grad_scale=grad_scale,
    )  # fmt: skip
    if grads.d_acts is not None:  # act_grad knows no index
        grads.d_acts.masked_fill_(top_acts == 0, 0.0)
    return grads
