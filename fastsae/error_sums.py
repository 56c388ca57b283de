"""How well coders reconstruct, in float64 sums over any number of batches: what training and evaluation both report.

Shapes: B sequences, S tokens, D width, K active latents, R sequences in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sae import ForwardOutput

CHUNK = 2**18
"""Numbers in float64 at a time."""


class ErrorSums:
    """Squared errors, variance, and active latents, summed by sequence in one pass.

    ``mean``: the targets' over all tokens, where it is known; the variance is taken about it. Without it, about the
    first batch's mean. :meth:`totals` corrects for the difference between either and the tokens' own mean.
    """

    def __init__(self, mean: Tensor | None = None):  # float64 [D]
        self._centre = mean
        self._offset: Tensor | None = None  # float64 [D]: Σ (y - centre)
        self._sums: list[Tensor] = []  # float64 [4, B] each: errors, squares, active latents, tokens

    @torch.no_grad()
    def add(self, y: Tensor, out: ForwardOutput, kept: Tensor | None = None) -> None:  # [B, S, D], bool [B, S]
        """Count a batch; ``kept`` says which tokens count, by default all."""
        if self._centre is None:
            self._centre = _mean(y.flatten(0, 1) if kept is None else y[kept])
        sums = torch.zeros(4, len(y), dtype=torch.float64)
        step = max(1, CHUNK // (len(y) * y.shape[2]))
        for begin in range(0, y.shape[1], step):
            part = slice(begin, begin + step)
            here = None if kept is None else kept[:, part]
            target, active = exact(y[:, part]), out.latent_acts[:, part] > 0
            centred = target if self._centre is None else target - self._centre  # None: no token counts
            measured = (
                (target - exact(out.sae_out[:, part])).square().sum(-1), centred.square().sum(-1), active.sum(-1),
                torch.ones(active.shape[:2]),
            )  # fmt: skip
            sums += torch.stack([per_sequence(values, here) for values in measured])
            offset = centred.flatten(0, 1) if here is None else centred[here.to(centred.device)]
            self._offset = offset.sum(0) + (0 if self._offset is None else self._offset)
        self._sums.append(sums)

    def by_sequence(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # float64 [R] each
        """Errors ``Σ‖y - ŷ‖²``, squares ``Σ‖y - mean‖²`` (for a known mean), active latents, and tokens."""
        errors, squares, active, tokens = torch.cat(self._sums, dim=1)
        return errors, squares, active, tokens

    def add_ranks(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what other ranks summed, about the same ``mean``: only :meth:`totals` is asked for afterwards."""
        assert self._centre is not None
        sums = torch.cat(self._sums, dim=1).sum(1) if self._sums else torch.zeros(4, dtype=torch.float64)
        offset = torch.zeros_like(self._centre) if self._offset is None else self._offset
        every = all_sum(torch.cat([sums.to(offset.device), offset]))
        self._sums, self._offset = [every[:4, None].cpu()], every[4:]

    def totals(self) -> dict[str, float]:
        """``fvu`` = Σ‖y - ŷ‖² / Σ‖y - mean(y)‖² and ``l0``, the mean number of active latents; NaN without tokens."""
        errors, squares, active, tokens = (
            (float(values.sum()) for values in self.by_sequence()) if self._sums else (0.0,) * 4
        )
        if self._offset is None or not tokens:
            return {"fvu": float("nan"), "l0": float("nan")}
        variance = squares - float(self._offset.square().sum()) / tokens
        return {"fvu": errors / variance, "l0": active / tokens}


def _mean(tokens: Tensor) -> Tensor | None:  # [N, D] -> float64 [D]
    """None of no tokens."""
    parts = tokens.split(max(1, CHUNK // max(1, tokens.shape[1])))
    return torch.stack([exact(part).sum(0) for part in parts]).sum(0) / len(tokens) if len(tokens) else None


def exact(values: Tensor) -> Tensor:
    """In float64, where they are; on the CPU where they are on Apple's GPUs, which have none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def per_sequence(values: Tensor, kept: Tensor | None) -> Tensor:  # [B, S], bool [B, S] -> float64 [B], on the CPU
    """Each sequence's sum over its kept tokens."""
    values = exact(values)
    return (values if kept is None else torch.where(kept.to(values.device), values, 0)).sum(1).cpu()
