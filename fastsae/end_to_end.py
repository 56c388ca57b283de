"""Losses of the model itself, ``ce`` and ``kl``: it runs with all coders grafted in, which learn from its predictions.

Shapes: B sequences, S tokens each, N tokens that count, D width in, E width out, V vocabulary.

A coder's reconstruction stands in place of its module's output at every token that is trained on; the others keep what
was there. The model's gradient reaches each coder through those behind it. AuxK is each coder's own: its dead latents
learn its residual, and nothing of that reaches the coders before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import ModelPass
from .config import TrainConfig
from .config_checks import check_end_to_end
from .distributed.strategy import Strategy
from .errors import ConfigError, NonFiniteError
from .joint import StepLosses, fired_latents, latent_mask
from .metrics import TrainingMetrics
from .model_loss import check_has_head, loss_and_gradient, predictions
from .optim import active_latents
from .sae import FastSae


class EndToEnd:
    """Gradients of the model's loss by its ``coders``, one at each hookpoint, and the mean of that loss.

    Raises :class:`ConfigError` for a model without an LM head, and for several coders at a hookpoint.
    """

    def __init__(
        self, cfg: TrainConfig, model_pass: ModelPass, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics],
        strategy: Strategy,
    ):  # fmt: skip
        check_has_head(model_pass.model, "loss_fn", "train with loss_fn fvu")
        if several := [name for name in coders if "/" in name]:
            raise ConfigError(
                f"loss_fn: expected one coder per hookpoint with {cfg.loss_fn}, got {several[0]} beside others; "
                "train them in runs of their own"
            )
        for coder in coders.values():
            check_end_to_end(coder.cfg, cfg.loss_fn)
        self.cfg, self._pass, self.coders, self.metrics, self._strategy = cfg, model_pass, coders, metrics, strategy
        self._sums = torch.zeros(2, dtype=torch.float64)  # of the losses since the last reading, and batches

    def train(self, rows: dict[str, Tensor], share: float, step: int) -> None:
        """Add ``share`` of a batch's gradients to the coders', its losses to the metrics; ``step`` counts from 0."""
        auxk: list[Tensor] = []

        def graft(hookpoint: str, x: Tensor, y: Tensor) -> Tensor:
            coder, metrics = self.coders[hookpoint], self.metrics[hookpoint]
            with metrics.stopwatch:
                variance, count = self._strategy.variance(y.detach())
                out = coder(x, y, total_variance=variance, k=active_latents(self.cfg, coder, step))
                aux = out.fvu.new_zeros(())
                if (dead := latent_mask(metrics.dead_ids(), coder.num_latents)) is not None:
                    aux = coder.auxk_loss(x.detach(), (y - out.sae_out).detach(), dead, variance)
                    auxk.append(self.cfg.auxk_alpha * share * aux)
            fired = fired_latents(out, coder.num_latents)
            losses = StepLosses(out.fvu.detach(), aux.detach(), out.multi_topk_fvu.detach(), fired)
            metrics.add(losses, len(y) / count)
            metrics.watch(step + 1, variance)
            return out.sae_out

        logits, loss, gradient = self._run(rows, graft, at=f"step {step + 1}")
        if not loss.isfinite():
            raise NonFiniteError(
                f"step {step + 1}: expected a finite {self.cfg.loss_fn} loss, got {loss.item()}; nothing was saved "
                "since. Lower --lr, or load the model with --dtype float32"
            )
        self._sums += torch.stack([loss, torch.ones_like(loss)])
        parameters = [parameter for coder in self.coders.values() for parameter in coder.parameters()]
        terms = [(term, None) for term in auxk] + ([(logits, gradient.mul_(share))] if logits.requires_grad else [])
        outputs, gradients = zip(*terms, strict=True) if terms else ((), ())
        if outputs:
            torch.autograd.backward(outputs, gradients, inputs=parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def measure(self, batches: Any) -> float:
        """The loss over held-out ``batches``, with the weights that the coders have now; NaN where there are none."""
        sums = torch.zeros(2, dtype=torch.float64)
        for rows in batches:
            _, loss, _ = self._run(rows, lambda name, x, y: self.coders[name](x, y).sae_out, at="held-out data")
            count = self._count(self._real(rows))
            sums += torch.stack([loss * count, torch.tensor(float(count))])
        return float(sums[0] / sums[1])

    def read(self) -> float:
        """The mean loss of batches since the last reading."""
        mean = float(self._sums[0] / self._sums[1].clamp(min=1))
        self._sums.zero_()
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])

    def _run(self, rows: dict[str, Tensor], graft: Callable, *, at: str) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [B, S, V], the whole batch's loss [], this rank's part of its gradient by the logits)."""
        batch, real = self._pass.prepare(rows), self._real(rows)
        clean = self._pass.logits(batch, at=at) if self.cfg.loss_fn == "kl" else None
        logits = self._pass.logits(batch, graft, at=at, gradients=torch.is_grad_enabled())
        loss, gradient = loss_and_gradient(logits.detach(), clean, batch.ids, real.to(logits.device), self._count(real))
        if self._strategy.world.size > 1:
            loss = torch.tensor(sum(self._strategy.world.every(loss.item())), dtype=torch.float64)
        return logits, loss, gradient

    def _count(self, real: Tensor) -> int:
        """Predictions (ce) or tokens (kl) of the whole batch, of which this rank's ``real`` are a part."""
        own = int((predictions(real) if self.cfg.loss_fn == "ce" else real).sum())
        return sum(row[0] for row in self._strategy.world.all_gather_sizes([own]))

    @staticmethod
    def _real(rows: dict[str, Tensor]) -> Tensor:  # bool [B, S]
        """Tokens that are no padding: excluded ones are predicted, and predict, as others do."""
        real = torch.ones_like(rows["input_ids"], dtype=torch.bool)
        for key in ("attention_mask", "counts"):
            if key in rows:
                real &= rows[key].bool()
        return real
