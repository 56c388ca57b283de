"""Rows of token ids, and what becomes of several: a batch.

Shapes: B rows in a batch, S tokens in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError

Row = Mapping[str, Any]
"""``input_ids`` of S integers, and where there is padding an ``attention_mask`` of S zeros and ones."""


def check_rows(dataset: Any) -> None:
    """Raise :class:`ArtifactError` unless ``dataset`` has ``len`` and ``[i]``, and its rows have ``input_ids``."""
    came = type(dataset).__name__
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        try:
            row = dataset[0] if len(dataset) else {"input_ids": ()}
        except (KeyError, TypeError, IndexError):
            row = None
        if isinstance(row, Mapping) and "input_ids" in row:
            return
        if isinstance(row, Mapping):
            came += f" with {', '.join(map(str, row))}"
        else:
            came += f" of {type(row).__name__}" if row is not None else ", which knows no [0]"
    raise ArtifactError(
        "dataset: expected rows like {'input_ids': [5, 6, ...]} in something with len and [i] (datasets.Dataset, a "
        f"list), got {came}; text becomes rows by fastsae.tokenize, ids alone by "
        "datasets.Dataset.from_dict({'input_ids': ids}); of a DataLoader give its dataset"
    )


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Rows of equally many tokens -> ``input_ids [B, S]``, and ``attention_mask [B, S]`` where rows have one."""
    keys = [key for key in ("input_ids", "attention_mask") if key in rows[0]]
    batch = {key: [token_ids(row.get(key), key) for row in rows] for key in keys}
    lengths = sorted({len(ids) for ids in batch["input_ids"]})
    if len(lengths) > 1:
        raise ArtifactError(
            f"dataset: expected input_ids of one length, got lengths from {lengths[0]} to {lengths[-1]}; pack them, "
            "pad them with an attention_mask, or bring the text instead of input_ids"
        )
    return {key: torch.stack(tensors) for key, tensors in batch.items()}


def token_ids(value: Any, column: str = "input_ids") -> Tensor:
    """One row's integers as int64 [S]; raises :class:`ArtifactError` for anything else."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    numbers = ids is not None and ids.ndim == 1 and not (len(ids) and (ids.is_floating_point() or ids.is_complex()))
    if ids is None or not numbers:
        came = type(value).__name__ if ids is None else f"{ids.dtype} {list(ids.shape)}".removeprefix("torch.")
        raise ArtifactError(
            f"dataset: expected a list of integers per row in {column!r}, got {came} {str(value)[:40]!r}; "
            "bring token ids, or the text in another column (--text-column) without 'input_ids'"
        )
    return ids.long()


def idle() -> dict[str, Tensor]:
    """A batch of nothing, on which the model runs all the same."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return {"input_ids": ids, "counts": torch.zeros_like(ids, dtype=torch.bool)}
