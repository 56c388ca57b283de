"""Callables for delphi's ``LatentCache``: a hookpoint's activations in, dense latents out.

    from fastsae.compat.delphi import hookpoint_to_sparse_encode
    LatentCache(model, hookpoint_to_sparse_encode("checkpoints/run", model.device), batch_size=8)

delphi also reads fastsae's folders by itself, with the computation of sparsify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sae import FastSae
from .convert import load_all
from .dense import dense_latents
from .formats import sparsify


def as_latent_encoder(sae: FastSae) -> Callable[[Tensor], Tensor]:
    """``x [B, S, D] -> dense [B, S, L]``, without gradients."""
    return torch.no_grad()(partial(dense_latents, sae))


def hookpoint_to_sparse_encode(
    source: Path | str, device: str | torch.device = "cpu", hookpoints: Sequence[str] = ()
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The encoders of a run (folder or hub repository, any format) by hookpoint: delphi's dictionary of that name.

    Raises :class:`CheckpointError` where one of ``hookpoints`` (by default all) is not there.
    """
    coders = load_all(source)
    if missing := [name for name in hookpoints if name not in coders]:
        raise CheckpointError(f"no coder {missing[0]!r} in {source}; it holds: {', '.join(coders)}")
    wanted = {name: coders[name] for name in hookpoints or coders}
    return {
        coder.hookpoint or name: as_latent_encoder(sparsify.to_fastsae(coder).to(device))
        for name, coder in wanted.items()
    }
