"""Coders as files: a folder of the disk, or of a hub repository, in sparsify's format; one, or all of a run.

Shapes: D width (``d_in``), E output width (``d_out``), L latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from natsort import natsorted
from torch import nn

from . import checkpoint, coder_folders
from .coder_config import SaeConfig
from .errors import CheckpointError

Coder = TypeVar("Coder", bound="CoderFiles")


class CoderFiles(nn.Module):
    """What :class:`fastsae.FastSae` has to do with files; made by ``(d_in, cfg, device, decoder=, d_out=)``."""

    cfg: SaeConfig
    d_in: int
    d_out: int
    notes: dict[str, Any]
    """What fastsae stores about a coder's origin, under the key ``fastsae`` of cfg.json."""

    def save_to_disk(self, path: Path | str) -> None:
        """Write ``cfg.json`` and ``sae.safetensors`` into the folder ``path``; sparsify reads them too."""
        checkpoint.write_coder(path, self.cfg, (self.d_in, self.d_out), dict(self.state_dict()), self.notes)

    @classmethod
    def load_from_disk(
        cls: type[Coder],
        path: Path | str,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Coder:
        """The coder saved in the folder ``path``; its tensors keep the file's dtypes unless ``dtype`` is given."""
        cfg, (d_in, d_out), tensors, notes = checkpoint.read_coder(path)
        if decoder and "W_dec" not in tensors:
            raise CheckpointError(f"{path}: expected W_dec, got a file without a decoder; pass decoder=False")
        with torch.device("meta"):
            sae = cls(d_in, cfg, device="meta", d_out=d_out, decoder=decoder)
        if not decoder:
            tensors.pop("W_dec", None)
        sae.load_state_dict({name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}, assign=True)
        sae.notes = notes
        return sae.requires_grad_(True)

    @classmethod
    def load_from_hub(
        cls: type[Coder],
        name: str,
        hookpoint: str | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
    ) -> Coder:
        """One coder of a hub repository: at ``hookpoint``, or the only one at the repository's root."""
        root = coder_folders.download(name, None if hookpoint is None else f"{hookpoint}/*")
        folder = root
        if hookpoint is not None:
            if not (root / hookpoint / coder_folders.CONFIG_FILE).is_file():
                root = coder_folders.download(name, f"*{coder_folders.CONFIG_FILE}")  # to list the ones that exist
            folder = coder_folders.named_coder(root, hookpoint)
        return cls.load_from_disk(folder, device, decoder=decoder)

    @classmethod
    def load_many(
        cls: type[Coder],
        name: Path | str,
        local: bool = False,
        layers: list[str] | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        pattern: str | None = None,
    ) -> dict[str, Coder]:
        """Every coder of a run's folder (``local``) or hub repository by hookpoint, in natural order.

        ``layers`` names the ones wanted, ``pattern`` is a wildcard on their names.
        """
        root = Path(name) if local else coder_folders.download(str(name), pattern and f"{pattern}/*")
        folders = coder_folders.find_coders(root, pattern=pattern)
        if layers is not None:
            folders = {layer: coder_folders.named_coder(root, layer) for layer in natsorted(layers)}
        if not folders:
            which = f" matching {pattern!r}" if pattern else ""
            raise CheckpointError(f"expected coders{which} in {root}, found none; names look like 'h.0.mlp.act'")
        return {key: cls.load_from_disk(folder, device, decoder=decoder) for key, folder in folders.items()}
