"""One coder's training step on one hookpoint's activations: losses, and gradients or the optimizer's update.

Shapes: N tokens, D width in, E width out, L latents, K active latents, R dead latents.

Two ways to the same numbers: ``coder_step``, which knows the losses and needs no autograd, and autograd through
``FastSae.forward``, for what ``coder_step`` does not do (Multi-TopK on top of GroupMax).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import TrainConfig
from .errors import OutOfMemoryError, is_out_of_memory
from .ops import Block, Coder, GradSink, Loss
from .row_optimizer import RowOptimizer
from .sae import FastSae, ForwardOutput

if TYPE_CHECKING:
    from .ops import GraphedStep


class StepLosses(NamedTuple):
    """What a step reports."""

    fvu: Tensor  # []
    auxk: Tensor  # []
    multi_topk_fvu: Tensor  # []
    fired: Tensor  # bool [L]
    prefix_fvus: Tensor | None = None  # [P]: of Matryoshka's prefixes, the last is fvu
    least: Tensor | None = None  # []: BatchTopK's smallest selected activation, inf where there is none


def joint_step(
    coder: FastSae,
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, E]
    variance: Tensor,  # []
    cfg: TrainConfig,
    *,
    dead: Tensor | None,  # [R] int64, ascending: latents that AuxK revives; of a slice, those in it
    num_dead: int | None = None,  # of a slice: in the whole coder
    share: float,
    optimizer: RowOptimizer | None,
    inside: bool = True,
    k: int | None = None,
    selected: list[Block] | None = None,
    graphed: GraphedStep | None = None,
) -> StepLosses:
    """Losses of a batch, or of a chunk of it, and their gradients times ``share`` added to the coder's.

    With an ``optimizer`` its narrow copies of the matrices are computed with, where it keeps them; ``inside``, the
    matrices take their step at once, and only the small tensors get gradients.
    ``k``: active latents in this step, by default the coder's. ``selected``: what :func:`select` selected for these
    tokens. ``graphed``: what replays the step. Where memory runs out, torch's error comes through
    as long as nothing was changed; :class:`OutOfMemoryError` says that the step was half done.
    """
    k = k or coder.cfg.k
    if coder.cfg.multi_topk and coder.cfg.activation != "topk":
        return _autograd_step(coder, x, y, variance, cfg, dead, share)
    assert coder.W_dec is not None
    k_aux = coder.cfg.k_aux_for(coder.d_out)
    multi_k = min(4 * k, coder.all_latents) if coder.cfg.multi_topk else 0
    prefixes = coder.cfg.prefixes_for(coder.num_latents)
    loss = Loss(variance, multi_k if multi_k > k else 0, dead, k_aux, cfg.auxk_alpha, share, num_dead, prefixes)
    small = [_grad(p) for p in (coder.encoder.bias, coder.b_dec, coder.W_skip) if p is not None]  # memory first
    if optimizer is not None and inside:
        sink = optimizer.row_step(coder)
    else:
        sink = GradSink(_grad(coder.encoder.weight), _grad(coder.W_dec))
    try:
        out = ops.coder_step(
            x, y, _tensors(coder, optimizer), loss, sink,
            k=k, activation=coder.cfg.activation, implementation=coder.implementation, peers=coder.peers,
            selected=selected, graphed=graphed,
        )  # fmt: skip
    except RuntimeError as error:
        if sink.begun and is_out_of_memory(error):
            raise OutOfMemoryError(
                "out of memory in the middle of a coder's update, which cannot be undone; "
                "go on from the last checkpoint with a higher --micro-acc-steps"
            ) from error
        raise
    if optimizer is not None and inside:
        optimizer.count_row_step(coder)
    for total, grad in zip(small, (out.d_bias, out.d_b_dec, out.d_skip), strict=False):
        assert grad is not None
        total.add_(grad)
    least = None
    if coder.cfg.activation == "batchtopk":
        least = torch.where(out.top_acts > 0, out.top_acts, torch.inf).min()
    return StepLosses(out.fvu, out.auxk, out.multi_fvu, out.fired, out.prefix_fvus, least)


def select(
    coder: FastSae, x: Tensor, optimizer: RowOptimizer | None, k: int, parts: int  # [N, D]
) -> list[Block]:  # fmt: skip
    """BatchTopK's selection of a whole batch, for :func:`joint_step` on parts of it; encodes in so many ``parts``."""
    return ops.select_batch(x, _tensors(coder, optimizer), k, parts=parts, implementation=coder.implementation)


def _tensors(coder: FastSae, optimizer: RowOptimizer | None) -> Coder:
    """With the optimizer's narrow copies, where it keeps them."""
    assert coder.W_dec is not None
    low = {} if optimizer is None else optimizer.low
    return Coder(
        coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec, coder.W_skip, not coder.cfg.transcode,
        low.get(coder.encoder.weight), low.get(coder.W_dec),
    )  # fmt: skip


def _autograd_step(
    coder: FastSae, x: Tensor, y: Tensor, variance: Tensor, cfg: TrainConfig, dead: Tensor | None, share: float
) -> StepLosses:
    with torch.enable_grad():
        out = coder(x, y, dead_mask=latent_mask(dead, coder.num_latents), total_variance=variance)
        total = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        parameters = list(coder.parameters())
        grads = torch.autograd.grad(total * share, parameters)  # all or none: .grad is not half summed without memory
    for parameter, grad in zip(parameters, grads, strict=True):
        _grad(parameter).add_(grad)
    losses = (out.fvu.detach(), out.auxk_loss.detach(), out.multi_topk_fvu.detach())
    return StepLosses(*losses, fired_latents(out, coder.num_latents))


def fired_latents(out: ForwardOutput, num_latents: int) -> Tensor:  # bool [L]
    """The latents that are active for any token of a forward."""
    fired = torch.zeros(num_latents, dtype=torch.uint8, device=out.latent_indices.device)
    active = (out.latent_acts.detach() > 0).to(torch.uint8).flatten()
    return fired.scatter_reduce_(0, out.latent_indices.flatten(), active, "amax").bool()


def latent_mask(latents: Tensor | None, num_latents: int) -> Tensor | None:  # [R] -> bool [L]
    """True at ``latents``; None where they are."""
    if latents is None:
        return None
    return torch.zeros(num_latents, dtype=torch.bool, device=latents.device).index_fill_(0, latents, True)


def _grad(parameter: Tensor) -> Tensor:
    """The parameter's gradient, zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
