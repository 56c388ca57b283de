"""Activations and their columns as one integer each, which sorts as the tie rule says; the twin of :mod:`.keys`.

Shapes: N tokens, C candidates, K active latents.

    rank   int64  float32 bits of the activation ‖ ~column: larger activation first, equal ones by smaller column
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN_KEY = 0x7FFFFFFF
"""Above inf: NaN competes as the largest activation, and all NaN tie."""


def pack(acts: Tensor, columns: Tensor) -> Tensor:
    """Ranks of float32 ``acts`` (not negative) at int64 ``columns``, below 2³¹; of their shape."""
    keys = acts.view(torch.int32).masked_fill(acts.isnan(), NAN_KEY).long() << 32
    return keys | (columns ^ 0x7FFFFFFF)


def unpack(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and columns of ``ranks``."""
    return (ranks >> 32).int().view(torch.float32), (ranks & 0x7FFFFFFF) ^ 0x7FFFFFFF


def best(acts: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [N, C] each -> [N, K] each
    """The k largest of non-negative ``acts`` with distinct ``columns``, larger first, equal ones by column."""
    if acts.dtype == torch.float32:
        return unpack(pack(acts, columns).topk(k, dim=1).values)
    columns, order = columns.sort(dim=1)
    acts, order = acts.gather(1, order).sort(dim=1, descending=True, stable=True)
    return acts[:, :k], columns.gather(1, order[:, :k])
