"""Whether saved files are what was saved: written whole or not at all, hashed, finite, and inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import ArtifactError, CheckpointError, first_line


def write_beside(path: Path, write: Callable[[Path], Any]) -> Path:
    """``write`` a file beside ``path``, down to the disk, and return it: renaming it into place is left to do.

    Raises :class:`ArtifactError` where it cannot be written (a full disk), and leaves nothing behind then.
    """
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise ArtifactError(
            f"output: could not write {path}: {first_line(error)}; what was saved before is still there"
        ) from None
    return beside


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    os.replace(write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8")), path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise :class:`CheckpointError` for the first tensor with NaN or inf."""
    for name, tensor in tensors.items():
        values = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats cannot be asked
        if not bool(torch.isfinite(values).all()):
            count = int((~torch.isfinite(values)).sum())
            raise CheckpointError(
                f"{path}: expected finite numbers, got {count} that are NaN or inf in {name}; "
                "take an earlier checkpoint"
            )


def check_name(name: str) -> str:
    """``name``, which must stay inside the folder it is looked up in: no ``..``, no absolute path, no backslash."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or PureWindowsPath(name).drive:
        raise CheckpointError(
            f"expected a coder's name such as 'h.0.mlp' or 'h.0/seed1', got {name!r}, which leads out of its folder"
        )
    return name
