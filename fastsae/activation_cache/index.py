"""What a cache of activations holds: its index file, and how large it will be.

Shapes: R sequences, S tokens each, N tokens that are stored, D width. A shard is a safetensors file of ``counts
[R]`` int32, the stored tokens of each sequence, and per hookpoint ``HOOK/output [N, D]`` and perhaps ``HOOK/input``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..integrity import write_json

INDEX_FILE = "activations.json"
OUTPUT, INPUT, COUNTS = "output", "input", "counts"


@dataclass(frozen=True)
class Shard:
    """One file of the cache."""

    file: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What is stored, of what, and which part of it is done."""

    model: str
    dataset: str
    hookpoints: dict[str, int]
    """Width of each hookpoint's output."""
    inputs: dict[str, int]
    """Width of each hookpoint's input, where inputs are stored."""
    storage: str
    sequences: int
    """Sequences of the whole cache."""
    ctx_len: int
    shard_sequences: int
    """Sequences per shard; the last may have fewer."""
    data: dict[str, Any] = field(default_factory=dict)
    """How the dataset was read: split, order, limits, tokens left out."""
    shards: tuple[Shard, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.storage)

    @property
    def bytes_per_token(self) -> int:
        return (sum(self.hookpoints.values()) + sum(self.inputs.values())) * self.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        """Size of the whole cache, headers left out; tokens that are masked or left out make it smaller."""
        return self.sequences * (self.ctx_len * self.bytes_per_token + 4)

    @property
    def done(self) -> int:
        """Sequences that are on disk."""
        return sum(shard.sequences for shard in self.shards)

    def save(self, folder: Path) -> None:
        write_json(folder / INDEX_FILE, asdict(self))

    def same_but_shards(self, other: Index) -> list[str]:
        """Names of the fields that differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name != "shards" and mine[name] != theirs[name]]


def read_index(folder: Path | str) -> Index:
    """The index of a cache; raises :class:`ArtifactError` where there is none, or a damaged one."""
    path = Path(folder) / INDEX_FILE
    try:
        values = json.loads(path.read_text())
        return Index(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})
    except FileNotFoundError:
        raise ArtifactError(
            f"activations: expected a folder written by fastsae cache, found no {INDEX_FILE} in {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable index of activations ({error})") from None
