"""What the model does with activations replaced: its loss, and how far its predictions move.

Shapes: B sequences, S tokens each, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..error_sums import per_sequence
from ..hooks import Replacement
from ..model_loss import divergences, log_probabilities, next_token_losses, predictions
from ..sae import FastSae
from ..saved import coder_input
from .estimate import ratio
from .result import CrossEntropy


def graft(coder: FastSae, kept: Tensor | None) -> Replacement:
    """The coder's output: of the module's output, or for a transcoder of its input; only at kept tokens."""

    def replace(x: Tensor | None, y: Tensor) -> Tensor:
        return _only_at(kept, coder(coder_input(coder, x, y), y).sae_out.to(y.dtype), y)

    return replace


def constant(value: Tensor, kept: Tensor | None) -> Replacement:  # [D], bool [B, S]
    """The same vector at every kept token: zeros, or the mean."""
    return lambda _x, y: _only_at(kept, value.to(y).expand_as(y), y)


def _only_at(kept: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if kept is None else torch.where(kept[..., None], new, old)


class LossSums:
    """Losses and divergences of one way to run the model, summed by sequence."""

    def __init__(self):
        self._sums: list[Tensor] = []  # float64 [4, B]: losses, predictions, divergences, tokens

    def add(self, logits: Tensor, clean: Tensor, input_ids: Tensor, attended: Tensor | None) -> None:
        """Logits [B, S, V] of this way and of the model as it is, ids [B, S], bool [B, S]: tokens that are real.

        A loss counts where both the token that predicts and the one predicted are real, a divergence at every
        real token. One sequence at a time, in float32: [S, V] is the largest thing made.
        """
        losses, moved = [], []
        for ours, theirs, ids in zip(logits, clean, input_ids, strict=True):
            log_p = log_probabilities(ours)
            losses.append(next_token_losses(log_p, ids))
            moved.append(divergences(log_probabilities(theirs), log_p))
        both = None if attended is None else predictions(attended)
        loss, divergence = torch.stack(losses), torch.stack(moved)
        self._sums.append(
            torch.stack(
                [
                    per_sequence(loss, both),
                    per_sequence(torch.ones_like(loss), both),
                    per_sequence(divergence, attended),
                    per_sequence(torch.ones_like(divergence), attended),
                ]
            )
        )

    def read(self) -> Tensor:  # float64 [4, R]
        return torch.cat(self._sums, dim=1)


def cross_entropy(clean: LossSums, grafted: LossSums, zero: LossSums, mean: LossSums) -> CrossEntropy:
    """Losses as means over tokens; what is recovered as the ratio of their differences."""
    losses = {"clean": clean, "grafted": grafted, "zero": zero, "mean": mean}
    loss = {name: sums.read()[0] for name, sums in losses.items()}
    _, predictions, divergence, tokens = grafted.read()
    return CrossEntropy(
        **{name: ratio(values, predictions) for name, values in loss.items()},
        recovered=ratio(loss["zero"] - loss["grafted"], loss["zero"] - loss["clean"]),
        recovered_from_mean=ratio(loss["mean"] - loss["grafted"], loss["mean"] - loss["clean"]),
        kl=ratio(divergence, tokens),
        kl_zero=ratio(zero.read()[2], tokens),
    )
