"""What every latent does on a stretch of text: the sparse codes of all coders, from one pass of the model.

Shapes: R sequences, S tokens each, K active latents, L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from ..eval.batches import Batch, read_batches
from ..hooks import run_hooked
from ..progress import console
from ..sae import FastSae
from ..saved import check_places, coder_input


class Codes(NamedTuple):
    """One coder's activations, ordered by latent; on the CPU."""

    acts: Tensor
    """Activations above 0, float32 [F]."""
    positions: Tensor
    """Where: sequence · S + token, int64 [F]."""
    starts: Tensor
    """Latent i's are those from starts[i] to starts[i + 1], int64 [L + 1]."""

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """(activations, positions) of one latent, by position."""
        where = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.acts[where], self.positions[where]

    @property
    def counts(self) -> Tensor:  # int64 [L]
        """How often each latent fired."""
        return self.starts.diff()


def collect_codes(
    coders: dict[str, FastSae],
    model: Any,
    rows: Any,
    *,
    batch_size: int,
    exclude_tokens: Sequence[int] = (),
    progress: bool = True,
) -> tuple[Tensor, dict[str, Codes]]:
    """(token ids [R, S], codes by coder) of ``rows``; tokens that are masked or excluded have none."""
    calls = check_places(model, coders.items())
    ids: list[Tensor] = []
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in coders}

    @torch.no_grad()
    def look(hookpoint: str, x: Tensor | None, y: Tensor) -> None:
        for name, coder in coders.items():
            if name.partition("/")[0] == hookpoint:
                acts, indices, _ = coder.encode(coder_input(coder, x, y))
                found[name].append(_active(acts, indices, batch, offset))

    offset = 0
    batches = list(read_batches(rows, batch_size, model, exclude_tokens))
    for batch in track(batches, "reading latents", console=console, disable=not progress):
        run_hooked(model, batch.input_ids, calls, look, batch.attention_mask)
        ids.append(batch.input_ids.cpu())
        offset += batch.input_ids.numel()
    return torch.cat(ids), {name: _by_latent(parts, coders[name].num_latents) for name, parts in found.items()}


def _active(acts: Tensor, indices: Tensor, batch: Batch, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """(activations, latents, positions) above 0 at kept tokens, of [B, S, K]."""
    active = acts > 0
    if batch.kept is not None:
        active &= batch.kept[..., None]
    positions = offset + torch.arange(batch.input_ids.numel(), device=acts.device)
    positions = positions.view(*batch.input_ids.shape, 1).expand_as(acts)
    return acts[active].float().cpu(), indices[active].cpu(), positions[active].cpu()


def _by_latent(parts: list[tuple[Tensor, Tensor, Tensor]], num_latents: int) -> Codes:
    acts, latents, positions = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = latents.argsort(stable=True)
    starts = torch.zeros(num_latents + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(latents, minlength=num_latents).cumsum(0)
    return Codes(acts[order], positions[order], starts)
