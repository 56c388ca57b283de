"""Writing activations: shard by shard, each whole or not at all, going on where an earlier run stopped.

Shapes: B sequences, S tokens each, N tokens that are stored, D width.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..collation import Row
from ..errors import ArtifactError, HookpointError
from ..eval.batches import Batch, read_batches
from ..hooks import run_hooked
from ..integrity import sha256, write_beside
from ..rows import RowSource
from .index import COUNTS, INDEX_FILE, INPUT, OUTPUT, Index, Shard, read_index


def open_folder(folder: Path, index: Index) -> Index:
    """``index`` with the shards that are in ``folder`` already; raises :class:`ArtifactError` for other contents."""
    if not (folder / INDEX_FILE).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ArtifactError(f"output: expected a new folder or a cache, {folder} holds other files; choose another")
        return index
    there = read_index(folder)
    if differing := index.same_but_shards(there):
        name = differing[0]
        raise ArtifactError(
            f"output: {folder} holds a cache with {name} = {getattr(there, name)!r}, not {getattr(index, name)!r}; "
            "choose another --output, or remove it"
        )
    return there


def write_cache(
    folder: Path, index: Index, model: Any, rows: RowSource, batch_size: int, exclude_tokens: tuple[int, ...],
    advance: Callable[[int], None] = lambda _sequences: None,
) -> Index:  # fmt: skip
    """Write what is missing of ``index`` from ``rows``, at their start; ``advance`` hears of sequences done."""
    folder.mkdir(parents=True, exist_ok=True)
    index.save(folder)
    skipped = index.done
    while skipped:
        skipped -= len(rows.take(min(skipped, 256))) or skipped
    while index.done < index.sequences:
        part = rows.take(min(index.shard_sequences, index.sequences - index.done))
        if not part:
            raise ArtifactError(f"dataset: expected {index.sequences} sequences, it ended after {index.done}")
        tensors = _activations(index, model, part, batch_size, exclude_tokens, advance)
        shard = _write_shard(folder, f"shard-{len(index.shards):05d}.safetensors", tensors)
        index = dataclasses.replace(index, shards=(*index.shards, shard))
        index.save(folder)
    return index


def _activations(
    index: Index, model: Any, rows: list[Row], batch_size: int, exclude_tokens: Iterable[int],
    advance: Callable[[int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that a shard holds, of ``rows``."""
    parts: dict[str, list[Tensor]] = {}
    calls = dict.fromkeys(index.hookpoints, 1)

    def keep(name: str, tensor: Tensor, batch: Batch) -> None:
        if tensor.shape[:-1] != batch.input_ids.shape:
            raise HookpointError(
                f"{name}: expected activations {list(batch.input_ids.shape)} tokens by width to store, "
                f"got {list(tensor.shape)}"
            )
        kept = tensor.flatten(0, 1) if batch.kept is None else tensor[batch.kept]
        parts.setdefault(name, []).append(kept.to(index.dtype).cpu())

    for batch in read_batches(rows, batch_size, model, tuple(exclude_tokens)):

        def look(hookpoint: str, x: Tensor | None, y: Tensor, batch: Batch = batch) -> None:
            keep(f"{hookpoint}/{OUTPUT}", y, batch)
            if hookpoint in index.inputs:
                assert x is not None  # its width is known
                keep(f"{hookpoint}/{INPUT}", x, batch)

        run_hooked(model, batch.input_ids, calls, look, batch.attention_mask)
        count = batch.input_ids.shape[1] if batch.kept is None else batch.kept.sum(1).cpu()
        parts.setdefault(COUNTS, []).append(torch.zeros(len(batch.input_ids), dtype=torch.int32) + count)
        advance(len(batch.input_ids))
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


def _write_shard(folder: Path, name: str, tensors: dict[str, Tensor]) -> Shard:
    tensors[COUNTS] = tensors[COUNTS].to(torch.int32)
    path = folder / name
    beside = write_beside(path, lambda file: save_file(tensors, file))
    digest, size = sha256(beside), beside.stat().st_size
    os.replace(beside, path)
    counts = tensors[COUNTS]
    return Shard(name, len(counts), int(counts.sum()), size, digest)
