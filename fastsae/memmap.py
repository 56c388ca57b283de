"""Token ids in a flat binary file (``.bin``), memory-mapped: the corpus never has to fit into memory.

Shapes: S tokens per row (``ctx_len``); the file holds rows of S ids one behind another, without a header,
as sparsify's ``MemmapDataset`` and the Pythia and Megatron tools write them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArtifactError

logger = logging.getLogger("fastsae")

SUFFIX = ".bin"
DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


class MemmapTokens:
    """Rows of ``input_ids [S]`` int64 from a file of uint16 or uint32 ids; an unfinished last row is left out.

    ``dtype`` auto reads ``FILE.bin.json`` (``{"dtype": "uint32"}``) where there is one, and is uint16 without.
    Raises :class:`ArtifactError` for a file that cannot be of this type, or is shorter than one row.
    """

    def __init__(self, path: Path | str, ctx_len: int, dtype: str = "auto"):
        path = Path(path)
        self.dtype = side_dtype(path) if dtype == "auto" else dtype
        size, width = path.stat().st_size, np.dtype(DTYPES[self.dtype]).itemsize
        if size % width:
            raise ArtifactError(
                f"dataset: expected {path.name} to hold {self.dtype} ids, {width} bytes each, got {size} bytes; "
                "is the file cut off, or of another type (--bin-dtype)?"
            )
        rows = size // width // ctx_len
        if rows == 0:
            raise ArtifactError(
                f"dataset: expected at least {ctx_len} tokens in {path.name}, got {size // width}; lower --ctx-len"
            )
        flat = np.memmap(path, dtype=DTYPES[self.dtype], mode="r", shape=(rows * ctx_len,))
        self._rows = flat.reshape(rows, ctx_len)
        self._order: np.ndarray | range = range(rows)
        if self.dtype == "uint16" and dtype == "auto":
            _check_not_wider(flat[:4096], path)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self._rows[self._order[index]].astype(np.int64))}

    def shuffle(self, seed: int) -> MemmapTokens:
        """The same rows in an order of their own; nothing is read or copied."""
        return self._reordered(np.random.default_rng(seed).permutation(np.asarray(self._order)))

    def select(self, indices: range) -> MemmapTokens:
        """The rows ``indices.start`` to ``indices.stop``, in this order."""
        return self._reordered(self._order[indices.start : indices.stop])

    def _reordered(self, order: Any) -> MemmapTokens:
        other = MemmapTokens.__new__(MemmapTokens)
        other.dtype, other._rows, other._order = self.dtype, self._rows, order
        return other


def side_dtype(path: Path) -> str:
    """The type that ``FILE.bin.json`` names; uint16 where there is no such file."""
    side = path.with_name(path.name + ".json")
    if not side.is_file():
        logger.info("%s: reading its token ids as uint16; --bin-dtype chooses another type", path.name)
        return "uint16"
    try:
        dtype = json.loads(side.read_text(encoding="utf-8"))["dtype"]
    except (ValueError, KeyError, TypeError):
        dtype = None
    if dtype not in DTYPES:
        raise ArtifactError(f'dataset: expected {{"dtype": "uint16"}} or "uint32" in {side.name}, got neither')
    return dtype


def _check_not_wider(start: np.ndarray, path: Path) -> None:
    """Small uint32 ids read as uint16 have a 0 behind every id: nobody means that."""
    if len(start) >= 16 and not start[1::2].any() and start[::2].any():
        raise ArtifactError(
            f"dataset: expected uint16 ids in {path.name}, got a 0 in every second place, as uint32 ids have; "
            "choose with --bin-dtype uint16 or uint32"
        )
