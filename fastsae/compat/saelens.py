"""fastsae in SAELens 6: its TopK classes on fastsae's kernels, TopK transcoders, and converters for its loaders.

    from fastsae.compat import saelens
    saelens.register()
    sae = SAE.load_from_disk("checkpoints/run/h.3.mlp", converter=saelens.disk_converter)
    sae = SAE.from_pretrained("EleutherAI/sae-llama-3-8b-32x", "layers.10", converter=saelens.hub_converter)

To give a coder to people without fastsae: ``fastsae convert FOLDER OUT --to saelens``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import str_to_dtype
from torch import Tensor

from ..errors import CheckpointError
from . import convert, saelens_topk, saelens_transcoder
from .coder import Coder
from .formats import saelens as saelens_format
from .saelens_topk import FastTopKSAE, FastTopKSAEConfig, FastTopKTrainingSAE, FastTopKTrainingSAEConfig
from .saelens_transcoder import (
    FastTopKTranscoder,
    FastTopKTranscoderConfig,
    FastTopKTranscoderTrainingSAE,
    FastTopKTranscoderTrainingSAEConfig,
    pair_batches,
)

__all__ = [
    "FastTopKSAE",
    "FastTopKSAEConfig",
    "FastTopKTrainingSAE",
    "FastTopKTrainingSAEConfig",
    "FastTopKTranscoder",
    "FastTopKTranscoderConfig",
    "FastTopKTranscoderTrainingSAE",
    "FastTopKTranscoderTrainingSAEConfig",
    "disk_converter",
    "hub_converter",
    "pair_batches",
    "register",
]


def register() -> None:
    """Add the architectures ``fastsae_topk`` and ``fastsae_topk_transcoder`` to SAELens; a second call does nothing."""
    if is_registered():
        return
    register_sae_class(saelens_topk.ARCHITECTURE, FastTopKSAE, FastTopKSAEConfig)
    register_sae_training_class(saelens_topk.ARCHITECTURE, FastTopKTrainingSAE, FastTopKTrainingSAEConfig)
    register_sae_class(saelens_transcoder.ARCHITECTURE, FastTopKTranscoder, FastTopKTranscoderConfig)
    register_sae_training_class(
        saelens_transcoder.ARCHITECTURE, FastTopKTranscoderTrainingSAE, FastTopKTranscoderTrainingSAEConfig
    )


def is_registered() -> bool:
    return saelens_topk.ARCHITECTURE in SAE_CLASS_REGISTRY


def disk_converter(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``SAE.load_from_disk(path, converter=disk_converter)``: a folder or file of any format that fastsae reads.

    After :func:`register` TopK coders compute with fastsae's kernels, before it they are SAELens' own. Raises
    :class:`CheckpointError` for what SAELens cannot compute.
    """
    return _for_saelens(convert.load(path), device, cfg_overrides)


def hub_converter(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """``SAE.from_pretrained(repo, hookpoint, converter=hub_converter)``: likewise, of a hub repository.

    The hub client sees to it that files are the newest; ``force_download`` is SAELens' argument and adds nothing.
    """
    return (*_for_saelens(convert.load(repo_id, folder_name), device, cfg_overrides), None)


def _for_saelens(
    coder: Coder, device: str, overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    coder, lost = saelens_format.fit(coder)
    if lost:
        raise CheckpointError(f"SAELens cannot compute this coder: {'; '.join(lost)}")
    cfg, tensors = saelens_format.to_parts(coder)
    if cfg["architecture"] == saelens_transcoder.ARCHITECTURE and not is_registered():
        raise CheckpointError("SAELens has no TopK transcoders; call fastsae.compat.saelens.register() first")
    if cfg["architecture"] == "topk" and is_registered():
        cfg["architecture"] = saelens_topk.ARCHITECTURE
    cfg |= {"device": device, **(overrides or {})}
    dtype = str_to_dtype(cfg["dtype"])
    return cfg, {name: tensor.to(device=cfg["device"], dtype=dtype) for name, tensor in tensors.items()}
