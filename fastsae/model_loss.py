"""A language model's own losses: next-token cross-entropy, and the divergence from what it said before.

Shapes: B sequences, S tokens each, V vocabulary. Sums over V are float32 (float64 for float64 logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError


def check_has_head(model: Any, option: str, way_out: str) -> None:
    """Raise :class:`ConfigError` for a model that cannot say what comes next."""
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"{option}: expected a model with an LM head, got {type(model).__name__}; load it with "
            f"AutoModelForCausalLM (fastsae.load_language_model), or {way_out}"
        )


def log_probabilities(logits: Tensor) -> Tensor:  # [S, V]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def next_token_losses(log_p: Tensor, ids: Tensor) -> Tensor:  # [S, V], int64 [S] -> [S - 1]
    """``-log p`` of the token that comes next, at every token but the last."""
    return -log_p[:-1].gather(1, ids[1:, None])[:, 0]


def divergences(log_q: Tensor, log_p: Tensor) -> Tensor:  # [S, V] each -> [S]
    """``KL(q ‖ p) = Σ q (log q - log p)`` over the vocabulary, at every token."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def predictions(real: Tensor) -> Tensor:  # bool [..., S] -> [..., S - 1]
    """Where a next-token loss counts: both the token that predicts and the one predicted are real."""
    return real[..., 1:] & real[..., :-1]


@torch.no_grad()
def loss_and_gradient(
    logits: Tensor, clean: Tensor | None, ids: Tensor, real: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """(the batch's loss [] float64, its gradient by ``logits`` [B, S, V]): a mean over ``count`` predictions or tokens.

    With ``clean`` logits of the same batch KL(clean ‖ ours) at ``real`` tokens (bool [B, S]), without them the
    next-token cross-entropy. The softmax's gradients are written out, one sequence at a time: p - q, or p minus one
    at the token that came; only [S, V] exists in float32, and for clean logits the gradient is 0 exactly.
    """
    total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(logits)
    for i, (ours, tokens, counts) in enumerate(zip(logits, ids, real, strict=True)):
        log_p = log_probabilities(ours)
        if clean is None:
            losses, counts = next_token_losses(log_p, tokens), predictions(counts)
            d_logits = log_p[:-1].exp()
            d_logits.scatter_add_(1, tokens[1:, None], -torch.ones_like(d_logits[:, :1]))
        else:
            log_q = log_probabilities(clean[i])
            losses, d_logits = divergences(log_q, log_p), log_p.exp() - log_q.exp()
        total += torch.where(counts, losses, 0).cpu().sum(dtype=torch.float64) / max(1, count)
        gradient[i, : len(d_logits)] = torch.where(counts[:, None], d_logits, 0) / max(1, count)
    return total, gradient
