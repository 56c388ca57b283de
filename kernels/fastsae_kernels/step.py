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

from . import prefixes, reference
from .auxk import AuxGrads, auxk_grads
from .batch_topk import Block, batch_topk, rows_of_one_width
from .rules import Rows
from .split import Peers, own_k, own_winners
from .step_parts import Coder, GradSink, RowStep, Sink

__all__ = ["Block", "Coder", "GradSink", "Loss", "RowStep", "Rows", "Sink", "StepOutput", "coder_step", "select_batch"]


class Loss(NamedTuple):
    """What is minimised: ``fvu + alpha · auxk + multi_fvu / 8``, times ``share``.

    With ``prefixes``, in fvu's place the mean of all prefixes' (Bussmann et al. 2025, arXiv 2503.17547).
    """

    variance: Tensor  # []: FVU's denominator, Σ ‖y - mean‖²
    multi_k: int = 0  # latents of the Multi-TopK term, 0: none
    dead: Tensor | None = None  # [R] int64, ascending: latents that AuxK trains; with peers, this rank's
    k_aux: int = 0
    alpha: float = 0.0
    share: float = 1.0  # of an optimizer step, where gradients of several batches are summed
    num_dead: int | None = None  # with peers: the dead latents of all ranks
    prefixes: tuple[int, ...] = ()  # Matryoshka: ascending numbers of latents, the last is all of them


class StepOutput(NamedTuple):
    """The losses of a step, the selection, and the gradients of the small tensors.

    A token of BatchTopK with many active latents has several rows of the selection, V in all.
    """

    fvu: Tensor  # []
    auxk: Tensor  # []
    multi_fvu: Tensor  # []
    top_acts: Tensor  # [N, K]; with peers [N, W]: this rank's, W <= K, 0 where there are fewer; BatchTopK: [V, K]
    top_indices: Tensor  # [N, K]; [V, K]
    fired: Tensor  # bool [L]: latents with an activation above 0 among the K
    d_bias: Tensor  # [L]
    d_b_dec: Tensor  # [E]
    d_skip: Tensor | None  # [E, D]
    prefix_fvus: Tensor | None = None  # [P]: of Matryoshka's prefixes; the last is fvu
    rows: Tensor | None = None  # [V] int64: whose row of the selection it is; None: row n is token n's


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
    selected: list[Block] | None = None,
) -> StepOutput:
    """One pass over a batch: the losses, and ∂loss to ``sink`` and into the output; twin of autograd's path.

    The numbers are those of ``topk_encode``, ``batch_topk_encode``, ``sparse_decode`` and the losses of Gao et al. 2024
    (arXiv 2406.04093: FVU; AuxK, appendix A.2; Multi-TopK, appendix A.5) under autograd, up to the order of sums.
    Gradients are float32 (float64 for float64 x). With ``peers`` (:mod:`.split`) the coder is this rank's latents,
    ``k`` counts those of all ranks, and losses and d_b_dec are the same on every rank. ``selected``: what
    :func:`select_batch` selected of a larger batch for these tokens.

    Raises ``ValueError`` where ``multi_k`` is not a wider TopK than ``k``, ``prefixes`` do not fit, or BatchTopK or
    prefixes meet ``peers``.
    """
    _check(loss, k, activation, len(coder.bias), peers)
    backend = _backend(implementation)
    centered = backend.center(x, coder.b_dec) if coder.centered else x
    first_k, width = (k, loss.multi_k) if loss.multi_k else (0, k)
    if selected is not None:
        blocks = selected
    elif peers is None:
        blocks = _select(backend, centered, coder, width, activation)
    else:
        blocks, first_k = _own_selection(backend, centered, coder, width, first_k, activation, peers)
    goal = target if coder.W_skip is None else target - (x.to(coder.W_skip.dtype) @ coder.W_skip.T).to(target.dtype)
    if peers is not None:
        residual, sse = _sum_residual(backend, *blocks[0][1:], coder, goal, x.dtype, first_k, peers)
    elif first_k:
        residual, sse = backend.decode_residual(*blocks[0][1:], coder, goal, x.dtype, first_k)  # [2, N, E], [2]
    else:
        residual, sse = prefixes.residuals(backend, blocks, coder, goal, x.dtype, loss.prefixes)
    sse = sse / loss.variance
    full = residual[0] if first_k else residual[-1] if loss.prefixes else residual
    aux = _auxk(centered, full, coder, loss, peers)
    if first_k:  # slots below k serve both losses, the others Multi-TopK alone
        residual[1] /= 8
        residual[0] += residual[1]
    elif loss.prefixes:
        residual = prefixes.suffix_means(residual)
    every = residual[0] if first_k or loss.prefixes else residual  # what reaches each token's whole output
    scale = (2 * loss.share / loss.variance).to(reference.accumulator_dtype(x.dtype))
    d_out = every.sum(0, dtype=scale.dtype) * scale
    d_skip = None if coder.W_skip is None else (every.to(scale.dtype) * scale).T @ x.to(scale.dtype)
    selection = rows_of_one_width(blocks)
    own_aux = aux if aux is not None and len(aux.dead) else None
    d_bias, through_encoder, counts = prefixes.backward(
        backend, selection, centered, residual, scale, first_k, coder, own_aux, sink, loss.prefixes
    )
    if peers is not None and coder.centered:
        through_encoder = peers.sum(through_encoder)
    rows, acts, indices = selection
    acts, indices = acts[:, : first_k or None], indices[:, : first_k or None]
    none = torch.zeros_like(scale)
    return StepOutput(
        sse[0] if first_k else sse[-1] if loss.prefixes else sse, none if aux is None else aux.loss,
        sse[1] if first_k else none, acts, indices,
        _fired(acts, indices, len(coder.bias)) if first_k else counts > 0,
        d_bias, d_out - through_encoder if coder.centered else d_out, d_skip, sse if loss.prefixes else None, rows,
    )  # fmt: skip


@torch.no_grad()
def select_batch(x: Tensor, coder: Coder, k: int, *, parts: int = 1, implementation: str = "triton") -> list[Block]:
    """BatchTopK's selection of a whole batch x [N, D], for :func:`coder_step` on parts of it; encodes part by part."""
    backend = _backend(implementation)
    centered = backend.center(x, coder.b_dec) if coder.centered else x
    return _select(backend, centered, coder, k, "batchtopk", parts)


def _select(backend: ModuleType, x: Tensor, coder: Coder, k: int, activation: str, parts: int = 1) -> list[Block]:
    def encode(rows: Tensor, width: int, activation: str = "topk") -> tuple[Tensor, Tensor]:
        chunks = (
            backend.encode(chunk, coder.used_weight, coder.bias, width, activation, None) for chunk in rows.chunk(parts)
        )
        acts, indices = (list(parts) for parts in zip(*chunks, strict=True))
        return (acts[0], indices[0]) if len(acts) == 1 else (torch.cat(acts), torch.cat(indices))

    if activation == "batchtopk":
        return batch_topk(x, k, len(coder.bias), encode)
    return [Block(None, *encode(x, k, activation))]


def _own_selection(
    backend: ModuleType, x: Tensor, coder: Coder, k: int, first_k: int, activation: str, peers: Peers
) -> tuple[list[Block], int]:
    """This rank's part of the selection, and how many of its slots lie below ``first_k``."""
    candidates = own_k(k, activation, peers)
    acts, indices = backend.encode(x, coder.used_weight, coder.bias, candidates, activation, None)
    if activation == "topk":
        acts, indices, first_k = own_winners(acts, indices, k, first_k, peers)
    return [Block(None, acts, indices)], first_k


def _check(loss: Loss, k: int, activation: str, num_latents: int, peers: Peers | None) -> None:
    if peers is not None and (activation == "batchtopk" or loss.prefixes):
        raise ValueError("coder_step: expected all latents on one rank for BatchTopK and for prefixes, got peers")
    if loss.multi_k and (activation != "topk" or loss.multi_k <= k):
        raise ValueError(f"coder_step: expected multi_k > k = {k} and TopK, got {loss.multi_k} and {activation!r}")
    ends = loss.prefixes
    if ends and (loss.multi_k or ends[-1] != num_latents or list(ends) != sorted({0, *ends})[1:]):
        raise ValueError(
            f"coder_step: expected ascending prefixes that end with {num_latents} latents, no Multi-TopK, got {ends}"
        )


def _backend(implementation: str) -> ModuleType:
    """The module with ``center, encode, decode_residual, backward`` of that name."""
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


def _fired(acts: Tensor, indices: Tensor, num_latents: int) -> Tensor:  # [N, K], [N, K]
    """bool [L]: the latents with an activation above 0."""
    active = (acts > 0).to(torch.uint8).flatten()
    counts = torch.zeros(num_latents, dtype=torch.uint8, device=active.device)
    return counts.scatter_reduce_(0, indices.flatten(), active, "amax").bool()
