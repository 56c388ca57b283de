"""What a run measures about one coder: sums that stay on the device until they are read.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .deferred import DeadLatents, Stopwatch
from .errors import NonFiniteError
from .joint import StepLosses
from .sae import FastSae


class TrainingMetrics:
    """Means of the losses since the last reading, and how long every latent has been silent."""

    def __init__(self, name: str, coder: FastSae):
        self.name, self.coder = name, coder
        self.tokens_since_fired = torch.zeros(coder.num_latents, dtype=torch.int64, device=coder.device)
        self.fired = torch.zeros(coder.num_latents, dtype=torch.bool, device=coder.device)  # in this step
        self._dead: DeadLatents | None = None
        self._prefixes = coder.cfg.prefixes_for(coder.num_latents)[:-1]
        kinds = 4 + len(self._prefixes)  # fvu, auxk, multi_topk_fvu, batches, and every prefix's fvu
        self.step_sums = torch.zeros(kinds, device=coder.device)  # of this step
        self._sums = torch.zeros(kinds, device=coder.device)  # and of those before it
        self.stopwatch = Stopwatch(coder.device)
        self._bad_step = torch.full((2,), -1, dtype=torch.int64, device=coder.device)  # activations, losses

    def add(self, losses: StepLosses, share: float | Tensor) -> None:
        """Add the losses of a batch, or of a chunk that holds ``share`` of it; no synchronisation."""
        self.step_sums[:3] += torch.stack([losses.fvu, losses.auxk, losses.multi_topk_fvu]).float()
        self.step_sums[3] += share
        if losses.prefix_fvus is not None:
            self.step_sums[4:] += losses.prefix_fvus[:-1].float()
        self.fired |= losses.fired

    def watch(self, step: int, variance: Tensor | None = None) -> None:
        """Remember the first step at which the activations' variance or the losses stopped being usable."""
        losses = self.step_sums.isfinite().all()
        varies = torch.ones_like(losses) if variance is None else variance.isfinite() & (variance > 0)
        usable = torch.stack([varies, losses])
        self._bad_step = torch.where((self._bad_step < 0) & ~usable, step, self._bad_step)

    def end_step(self, tokens: int, threshold: int | None = None) -> None:
        """Count a step's tokens; latents that fired in it start from 0. ``threshold``: find the dead ones."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(self.fired, 0)
        self.fired.zero_()
        self._sums += self.step_sums
        self.step_sums.zero_()
        self._dead = None if threshold is None else self._find_dead(threshold)

    def state_dict(self) -> dict[str, Any]:
        """What the next step, and the next reading, depend on; between two steps."""
        return {
            "tokens_since_fired": self.tokens_since_fired,
            "sums": self._sums,
            "bad_step": self._bad_step,
            "seconds": self.stopwatch.read(),
            "looks_for_dead": self._dead is not None,
        }

    def load_state_dict(self, state: dict[str, Any], threshold: int) -> None:
        """``threshold`` is :meth:`end_step`'s, for the latents that are dead now."""
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._sums.copy_(state["sums"])
        self._bad_step.copy_(state["bad_step"])
        self.stopwatch = Stopwatch(self.coder.device, state["seconds"])
        self._dead = self._find_dead(threshold) if state["looks_for_dead"] else None

    def dead(self, threshold: int) -> Tensor:  # bool [L]
        return self.tokens_since_fired > threshold

    def dead_pct(self, threshold: int) -> float:
        """The share of all the coder's latents that are dead, in percent."""
        return 100 * self.coder.over_slices(self.dead(threshold).sum()).item() / self.coder.all_latents

    def _find_dead(self, threshold: int) -> DeadLatents:
        return DeadLatents(self.dead(threshold), self.coder.over_slices)

    def dead_ids(self) -> Tensor | None:  # [R] int64, ascending
        """The latents that were dead at the end of the last step; None where nobody looked, or none was.

        Of a slice those in it, None where the whole coder has none.
        """
        return None if self._dead is None else self._dead.ids()

    def num_dead(self) -> int:
        """How many latents of the whole coder :meth:`dead_ids` stands for."""
        return 0 if self._dead is None else self._dead.count()

    def read(self, threshold: int) -> dict[str, float]:
        """Means since the last reading, as Python numbers; raises :class:`NonFiniteError` by name and step."""
        self.check()
        self.stopwatch.read()
        sums = (self._sums + self.step_sums).tolist()
        self._sums.zero_()
        self.step_sums.zero_()
        batches = max(sums[3], 1e-9)
        values = {"fvu": sums[0] / batches, "dead_pct": self.dead_pct(threshold)}
        if sums[1]:
            values["auxk"] = sums[1] / batches
        if self.coder.cfg.multi_topk:
            values["multi_topk_fvu"] = sums[2] / batches
        values.update({f"fvu_{width}": total / batches for width, total in zip(self._prefixes, sums[4:], strict=True)})
        return values

    def check(self) -> None:
        activations, losses = self._bad_step.tolist()
        if activations >= 0:
            raise NonFiniteError(
                f"{self.name}, step {activations}: expected finite activations that vary, got NaN, inf or no variance; "
                "nothing was saved since. Load the model with --dtype float32, or leave tokens out (--exclude-tokens)"
            )
        if losses >= 0:
            raise NonFiniteError(
                f"{self.name}, step {losses}: expected a finite loss, got NaN or inf; nothing was saved since. "
                "Lower --lr"
            )

    def check_weights(self, step: int) -> None:
        """Raise :class:`NonFiniteError` where the coder itself is not finite: the last update is in no loss yet."""
        ends = [
            end for parameter in self.coder.parameters() for end in parameter.detach().aminmax()
        ]  # NaN passes through
        if not all(bool(end.isfinite()) for end in ends):
            raise NonFiniteError(
                f"{self.name}, step {step}: expected finite weights, got NaN or inf; nothing was saved since. "
                "Lower --lr"
            )
