"""What the report says of one latent: contexts, histogram, promoted tokens, neighbours.

Shapes: R sequences, S tokens each, L latents, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..sae import FastSae
from .codes import Codes
from .lens import logit_lens

BEFORE, AFTER = 20, 10
"""Tokens shown to each side of the strongest."""

BINS = 24
NEIGHBOURS = 6


def choose_latents(codes: Codes, count: int, wanted: Sequence[int] = ()) -> list[int]:
    """``wanted``, and ``count`` of those that fired at least twice, evenly from the rarest to the densest."""
    often = codes.counts
    alive = torch.nonzero(often > 1)[:, 0]
    ranked = alive[often[alive].argsort(stable=True)]
    spread = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().long()
    return sorted({*ranked[spread].tolist(), *(i for i in wanted if i < len(often))})


def describe_latents(
    coder: FastSae, codes: Codes, latents: Sequence[int], ids: Tensor, model: Any, contexts: int
) -> list[dict[str, Any]]:
    """One record per latent, of plain numbers; ``ids [R, S]`` is what the codes were read from."""
    assert coder.W_dec is not None
    W_dec = coder.W_dec.detach()
    rows = torch.tensor(latents, dtype=torch.int64, device=W_dec.device)
    lens = logit_lens(model, W_dec[rows])
    near = _nearest(W_dec, rows)
    records = []
    for n, latent in enumerate(latents):
        acts, positions = codes.of(latent)
        records.append(
            {
                "latent": latent,
                "density": len(acts) / ids.numel(),
                "largest": _rounded(acts.max().item()) if len(acts) else 0,
                "mean": _rounded(acts.mean().item()) if len(acts) else 0,
                "histogram": torch.histc(acts, BINS, 0, acts.max().item()).int().tolist() if len(acts) else [],
                "contexts": strongest_contexts(acts, positions, ids, contexts),
                "up": [(i, _rounded(value)) for i, value in lens[n].up] if lens else None,
                "down": [(i, _rounded(value)) for i, value in lens[n].down] if lens else None,
                "near": near[n],
            }
        )
    return records


def strongest_contexts(acts: Tensor, positions: Tensor, ids: Tensor, count: int) -> list[dict[str, Any]]:
    """The strongest firing of each of ``count`` sequences, with the tokens around it and their activations.

    A record: ``tokens`` ids, ``acts`` beside them, ``peak`` the index of the strongest, ``sequence``.
    """
    length = ids.shape[1]
    shown: list[dict[str, Any]] = []
    met: set[int] = set()
    for at in acts.argsort(descending=True, stable=True).tolist():
        sequence, token = divmod(int(positions[at]), length)
        if sequence in met:
            continue
        met.add(sequence)
        first, last = max(0, token - BEFORE), min(length, token + AFTER + 1)
        strengths = torch.zeros(length)
        inside = (positions >= sequence * length) & (positions < (sequence + 1) * length)
        strengths[positions[inside] - sequence * length] = acts[inside]
        shown.append(
            {
                "tokens": ids[sequence, first:last].tolist(),
                "acts": [_rounded(value) for value in strengths[first:last].tolist()],
                "peak": token - first,
                "sequence": sequence,
            }
        )
        if len(shown) == count:
            break
    return shown


@torch.no_grad()
def _nearest(W_dec: Tensor, rows: Tensor) -> list[list[tuple[int, float]]]:  # [L, D], int64 [n]
    """(latent, cosine) of the decoder rows closest to each of ``rows``, itself left out."""
    if len(rows) == 0:
        return []
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    cosines = unit[rows] @ unit.T
    cosines.scatter_(1, rows[:, None], -torch.inf)
    top = cosines.topk(min(NEIGHBOURS, len(unit) - 1))
    return [
        [(i, round(value, 3)) for i, value in zip(*pair, strict=True)]
        for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _rounded(value: float) -> float:
    """Three significant digits: what a reader sees, and a third of the file's size."""
    return float(f"{value:.3g}")
