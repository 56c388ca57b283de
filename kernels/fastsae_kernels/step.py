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
from .split import Peers, own_k, own_winners
from .step_parts import Batch, Coder, GradSink, RowStep, Sink

__all__ = ["Coder", "GradSink", "Loss", "RowStep", "Rows", "Sink", "StepOutput", "coder_step"]


class Loss(NamedTuple):
    """What is minimised: ``fvu + alpha · auxk + multi_fvu / 8``, times ``share``."""

    variance: Tensor  # []: FVU's denominator, Σ ‖y - mean‖²
    multi_k: int = 0  # latents of the Multi-TopK term, 0: none
    dead: Tensor | None = None  # [R] int64, ascending: latents that AuxK trains; with peers, this rank's
    k_aux: int = 0
    alpha: float = 0.0
    share: float = 1.0  # of an optimizer step, where gradients of several batches are summed
    num_dead: int | None = None  # with peers: the dead latents of all ranks


class StepOutput(NamedTuple):
    """The losses of a step, the selection, and the gradients of the small tensors."""

    fvu: Tensor  # []
    auxk: Tensor  # []
    multi_fvu: Tensor  # []
    top_acts: Tensor  # [N, K]; with peers [N, W]: this rank's, W <= K, 0 where there are fewer
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
    peers: Peers | None = None,
) -> StepOutput:
    """One pass over a batch: the losses, and ∂loss to ``sink`` and into the output; twin of autograd's path.

    The numbers are those of ``topk_encode``, ``sparse_decode`` and the losses of Gao et al. 2024 (arXiv 2406.04093:
    FVU; AuxK, appendix A.2; Multi-TopK, appendix A.5) under autograd, up to the order of sums. Gradients are
    float32 (float64 for float64 x). With ``peers`` (:mod:`.split`) the coder is this rank's latents, ``k`` counts those
    of all ranks, and losses and d_b_dec are the same on every rank. Raises ``ValueError`` where ``multi_k`` is not a
    wider TopK than ``k``.
    """
    if loss.multi_k and (activation != "topk" or loss.multi_k <= k):
        raise ValueError(f"coder_step: expected multi_k > k = {k} and TopK, got {loss.multi_k} and {activation!r}")
    backend = _backend(implementation)
    centered = reference.center(x, coder.b_dec if coder.centered else None)
    first_k, width = (k, loss.multi_k) if loss.multi_k else (0, k)
    candidates = width if peers is None else own_k(width, activation, peers)
    acts, indices = backend.encode(centered, coder.used_weight, coder.bias, candidates, activation, None)
    if peers is not None and activation == "topk":
        acts, indices, first_k = own_winners(acts, indices, width, first_k, peers)
    goal = target if coder.W_skip is None else target - (x.to(coder.W_skip.dtype) @ coder.W_skip.T).to(target.dtype)
    if peers is None:
        residual, sse = backend.decode_residual(acts, indices, coder, goal, x.dtype, first_k)  # [2, N, E] with first_k
    else:
        residual, sse = _sum_residual(backend, acts, indices, coder, goal, x.dtype, first_k, peers)
    sse = sse / loss.variance
    at_k = residual[0] if first_k else residual
    aux = _auxk(centered, at_k, coder, loss, peers)
    if first_k:  # slots below k serve both losses, the others Multi-TopK alone
        residual[1] /= 8
        residual[0] += residual[1]
    scale = (2 * loss.share / loss.variance).to(reference.accumulator_dtype(x.dtype))
    d_out = at_k.sum(0, dtype=scale.dtype) * scale
    d_skip = None if coder.W_skip is None else (at_k.to(scale.dtype) * scale).T @ x.to(scale.dtype)
    batch = Batch(by_latent(indices, acts, len(coder.bias)), centered, acts, indices, residual, scale, first_k)
    d_bias, through_encoder = backend.backward(batch, coder, aux if aux is not None and len(aux.dead) else None, sink)
    if peers is not None and coder.centered:
        through_encoder = peers.sum(through_encoder)
    return StepOutput(
        sse[0] if first_k else sse, torch.zeros_like(scale) if aux is None else aux.loss,
        sse[1] if first_k else torch.zeros_like(scale), acts[:, : first_k or None], indices[:, : first_k or None],
        _fired(batch, len(coder.bias)),
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


def _sum_residual(
    backend: ModuleType, acts: Tensor, indices: Tensor, coder: Coder, goal: Tensor, dtype: torch.dtype, first_k: int,
    peers: Peers,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``decode_residual`` over the latents of all ranks, the first of which counts b_dec and the goal."""
    if peers.rank:
        coder, goal = coder._replace(b_dec=torch.zeros_like(coder.b_dec)), torch.zeros_like(goal)
    part, _ = backend.decode_residual(acts, indices, coder, goal, reference.accumulator_dtype(dtype), first_k)
    residual = peers.sum(part)
    return residual.to(dtype), residual.square().sum((-2, -1))


def _auxk(x: Tensor, residual: Tensor, coder: Coder, loss: Loss, peers: Peers | None) -> AuxGrads | None:
    if loss.dead is None or not (len(loss.dead) if peers is None else loss.num_dead):
        return None
    return auxk_grads(
        x, residual, loss.dead, coder.weight, coder.bias, coder.W_dec, loss.k_aux, loss.variance,
        loss.alpha * loss.share, peers, loss.num_dead,
    )  # fmt: skip


def _fired(batch: Batch, num_latents: int) -> Tensor:
    """bool [L]: the latents with an activation above 0 among the first k."""
    k = batch.first_k
    if not k:
        return batch.index.offsets.diff() > 0
    active = (batch.top_acts[:, :k] > 0).to(torch.uint8).flatten()
    counts = torch.zeros(num_latents, dtype=torch.uint8, device=active.device)
    return counts.scatter_reduce_(0, batch.top_indices[:, :k].flatten(), active, "amax").bool()
