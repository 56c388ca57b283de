"""What a coder does on its own: variance, sparsity, how often its latents fire, how alike they are.

Shapes: B sequences, S tokens, N tokens after masking, D width, L latents, K active, R sequences in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..error_sums import ErrorSums, exact
from ..sae import ForwardOutput
from .estimate import ratio
from .result import DecoderCosines, Density, Reconstruction

HISTOGRAM = (-7.0, 0.0, 28)
"""log10 of the first and last edge, and number of bins, of the density histogram."""


class OutputMean:
    """The mean [D] of a hookpoint's output over all tokens, in float64 sums."""

    def __init__(self):
        self._sum = torch.zeros(())
        self._tokens = 0

    def add(self, y: Tensor, kept: Tensor | None) -> None:  # [B, S, D], bool [B, S]
        flat = y.flatten(0, 1) if kept is None else y[kept]
        self._sum = self._sum.to(exact(flat)) + exact(flat).sum(0)
        self._tokens += len(flat)

    def read(self) -> Tensor:  # float64 [D]
        return self._sum / self._tokens


class ReconstructionSums:
    """One coder's errors, variances and firing counts."""

    def __init__(self, num_latents: int, mean: Tensor):  # float64 [D]
        self._errors = ErrorSums(mean)
        self._fired = torch.zeros(num_latents, dtype=torch.int64)

    def add(self, y: Tensor, out: ForwardOutput, kept: Tensor | None) -> None:  # [B, S, D], ..., bool [B, S]
        self._errors.add(y, out, kept)
        active = out.latent_acts > 0
        if kept is not None:
            active &= kept[..., None]
        self._fired += torch.bincount(out.latent_indices[active].cpu(), minlength=len(self._fired))

    def read(self, dense_above: float) -> Reconstruction:
        """FVU is Σ‖y - ŷ‖² / Σ‖y - mean(y)‖² over all tokens, with the mean of all tokens."""
        error, variance, active, tokens = self._errors.by_sequence()
        count = int(tokens.sum())
        return Reconstruction(
            tokens=count, sequences=len(tokens), fvu=ratio(error, variance), l0=ratio(active, tokens),
            density=_density(self._fired, count, dense_above),
        )  # fmt: skip


def _density(fired: Tensor, tokens: int, dense_above: float) -> Density:  # int64 [L]
    density = fired.double() / tokens
    low, high, bins = HISTOGRAM
    alive = density[fired > 0].log10().clamp(min=low, max=high)
    return Density(
        latents=len(fired),
        dead=int((fired == 0).sum()),
        dense=int((density > dense_above).sum()),
        dense_above=dense_above,
        log10_edges=tuple(torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist()),
        counts=tuple(map(int, torch.histc(alive, bins, low, high).tolist())),
    )


@torch.no_grad()
def decoder_cosines(W_dec: Tensor, sample: int = 4096) -> DecoderCosines:  # [L, D]
    """How alike decoder directions are: each sampled row's largest cosine with any other row.

    Rows are sampled evenly where there are more than ``sample``. Rows of zeros are alike to none.
    """
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    count = len(rows)
    chosen = torch.linspace(0, count - 1, min(sample, count)).round().long().to(rows.device)
    largest = torch.cat([_largest_other(rows, part) for part in chosen.split(256)]) if count > 1 else rows.new_zeros(1)
    median, p99 = largest.quantile(torch.tensor([0.5, 0.99], device=largest.device)).tolist()
    return DecoderCosines(
        rows=len(chosen), mean=exact(largest).mean().item(), median=median, p99=p99,
        largest=largest.max().item(), above_90=exact(largest > 0.9).mean().item(),
    )  # fmt: skip


def _largest_other(rows: Tensor, chosen: Tensor) -> Tensor:  # [L, D], int64 [C] -> [C]
    cosines = rows[chosen] @ rows.T
    cosines.scatter_(1, chosen[:, None], -1.0)
    return cosines.amax(1)
