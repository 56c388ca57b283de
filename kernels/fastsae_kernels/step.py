"""The training step of a coder without autograd: losses, and gradients or the optimizer's update.

Shapes: N tokens, D width in, E width out (E = D for an autoencoder), L latents, K active latents, R dead latents.

    encode -> decode, residual and squared error in one pass -> backward, latent by latent -> sink

What happens to a matrix's gradient rows is up to a *sink*: :class:`GradSink` adds them to dense gradients,
:class:`RowStep` hands each row to an optimizer as soon as it is there, so that no [L, D] gradient exists. On a
GPU a RowStep runs inside the backward kernel; on a CPU block by block, in cache.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .auxk import AuxGrads, auxk_grads
from .by_latent import by_latent
from .rules import Rows
from .step_parts import Batch, Coder, GradSink, RowStep, Sink

__all__ = ["Coder", "GradSink", "Loss", "RowStep", "Rows", "Sink", "StepOutput", "coder_step"]


class Loss(NamedTuple):
    """What is minimised: ``fvu + alpha · auxk + multi_fvu / 8``, times ``share``."""

    variance: Tensor  # []: FVU's denominator, Σ ‖y - mean‖²
    multi_k: int = 0  # latents of the Multi-TopK term, 0: none
    dead: Tensor | None = None  # [R] int64, ascending: latents that AuxK trains
    k_aux: int = 0
    alpha: float = 0.0
    share: float = 1.0  # of an optimizer step, where gradients of several batches are summed


class StepOutput(NamedTuple):
    """The losses of a step, the selection, and the gradients of the small tensors."""

    fvu: Tensor  # []
    auxk: Tensor  # []
    multi_fvu: Tensor  # []
    top_acts: Tensor  # [N, K]
    top_indices: Tensor  # [N, K]
    fired: Tensor  # bool [L]: latents with an activation above 0 among the K
    d_bias: Tensor  # [L]
    d_b_dec: Tensor  # [E]
    d_skip: Tensor | None  # [E, D]


@torch.no_grad()
def coder_step(
    x: Tensor,  # [N, D]
    target: Tensor,  # [N, E]
    coder: Coder,
    loss: Loss,
    sink: Sink,
    *,
    k: int,
    activation: str = "topk",
    implementation: str = "triton",
) -> StepOutput:
    """One pass over a batch: the losses, and ∂loss to ``sink`` and into the output; twin of autograd's path.

    The numbers are those of ``topk_encode``, ``sparse_decode`` and the losses of Gao et al. 2024 (arXiv 2406.04093:
    FVU; AuxK, appendix A.2; Multi-TopK, appendix A.5) under autograd, up to the order of sums. Gradients are
    float32 (float64 for float64 x). Raises ``ValueError`` where ``multi_k`` is not a wider TopK than ``k``.
    """
    if loss.multi_k and (activation != "topk" or loss.multi_k <= k):
        raise ValueError(f"coder_step: expected multi_k > k = {k} and TopK, got {loss.multi_k} and {activation!r}")
    backend = _backend(implementation)
    centered = reference.center(x, coder.b_dec if coder.centered else None)
    acts, indices = backend.encode(centered, coder.used_weight, coder.bias, loss.multi_k or k, activation, None)
    first_k = k if loss.multi_k else 0
    goal = target if coder.W_skip is None else target - (x.to(coder.W_skip.dtype) @ coder.W_skip.T).to(target.dtype)
    residual, sse = backend.decode_residual(acts, indices, coder, goal, x.dtype, first_k)  # [2, N, E] with first_k
    sse = sse / loss.variance
    at_k = residual[0] if first_k else residual
    aux = _auxk(centered, at_k, coder, loss)
    if first_k:  # slots below k serve both losses, the others Multi-TopK alone
        residual[1] /= 8
        residual[0] += residual[1]
    scale = (2 * loss.share / loss.variance).to(reference.accumulator_dtype(x.dtype))
    d_out = at_k.sum(0, dtype=scale.dtype) * scale
    d_skip = None if coder.W_skip is None else (at_k.to(scale.dtype) * scale).T @ x.to(scale.dtype)
    batch = Batch(by_latent(indices, acts, len(coder.bias)), centered, acts, indices, residual, scale, first_k)
    d_bias, through_encoder = backend.backward(batch, coder, aux, sink)
    return StepOutput(
        sse[0] if first_k else sse, torch.zeros_like(scale) if aux is None else aux.loss,
        sse[1] if first_k else torch.zeros_like(scale), acts[:, :k], indices[:, :k], _fired(batch, k, len(coder.bias)),
        d_bias, d_out - through_encoder if coder.centered else d_out, d_skip,
    )  # fmt: skip


def _backend(implementation: str) -> ModuleType:
    """The module with ``encode, decode_residual, backward`` of that name."""
    if implementation == "triton":
        from . import latent_step as backend
    elif implementation == "cpu":
        from . import cpu_step as backend
    elif implementation == "reference":
        from . import reference_step as backend
    else:
        raise ValueError(f"implementation: expected 'triton', 'cpu' or 'reference', got {implementation!r}")
    return backend


def _auxk(x: Tensor, residual: Tensor, coder: Coder, loss: Loss) -> AuxGrads | None:
    if loss.dead is None or not len(loss.dead):
        return None
    return auxk_grads(
        x, residual, loss.dead, coder.weight, coder.bias, coder.W_dec, loss.k_aux, loss.variance,
        loss.alpha * loss.share,
    )  # fmt: skip


def _fired(batch: Batch, k: int, num_latents: int) -> Tensor:
    """bool [L]: the latents with an activation above 0 among the first k."""
    if not batch.first_k:
        return batch.index.offsets.diff() > 0
    active = (batch.top_acts[:, :k] > 0).to(torch.uint8).flatten()
    counts = torch.zeros(num_latents, dtype=torch.uint8, device=active.device)
    return counts.scatter_reduce_(0, batch.top_indices[:, :k].flatten(), active, "amax").bool()
