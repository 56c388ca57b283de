"""Values and tensors in a folder, without pickle: written down to the disk, and verified when read.

state.json             numbers, texts, lists, dicts; and the hashes of all files' content
tensors-0.safetensors  every tensor in it, byte for byte, in files of about 2 GB
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError
from .integrity import sha256

FORMAT = 2
STATE_FILE = "state.json"
SHARD_BYTES = 2 << 30  # held in memory beside the tensors' own while they are written
_TENSOR = "__tensor__"


def write_files(folder: Path, state: dict[str, Any], parts: int) -> None:
    """Write ``state`` (plain values and tensors, with text keys), one of ``parts``, down to the disk."""
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    hashes = {}
    for i, shard in enumerate(_shards(tensors)):
        path = folder / f"tensors-{i}.safetensors"
        save_file({name: tensors[name].detach().cpu().contiguous() for name in shard}, path)
        to_disk(path)
        hashes[path.name] = sha256(path)
    record = {"format": FORMAT, "parts": parts, "state_sha256": _hash(plain), "tensors_sha256": hashes}
    (folder / STATE_FILE).write_text(json.dumps({**record, "state": plain}), encoding="utf-8")
    to_disk(folder / STATE_FILE)
    to_disk(folder)


def _shards(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """The tensors' names, in groups of about SHARD_BYTES."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def read_files(folder: Path, parts: int) -> dict[str, Any]:
    """What was written there; raises :class:`CheckpointError` where it is not whole, or not one of ``parts``."""
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        whole = _hash(record["state"]) == record["state_sha256"]
        whole = whole and all(sha256(folder / name) == expected for name, expected in record["tensors_sha256"].items())
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder}: expected a training state, got unreadable files ({error})") from None
    if not whole:
        raise CheckpointError(f"{folder}: expected the files that were saved, got others: their hashes differ")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{folder}: expected a training state of format {FORMAT}, got {record['format']!r}")
    if record["parts"] != parts:
        raise CheckpointError(f"{folder}: expected {record['parts']} parts of a training state, got {parts}")
    tensors: dict[str, Tensor] = {}
    for name in record["tensors_sha256"]:
        tensors |= load_file(folder / name)
    return _put_tensors(record["state"], tensors)


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with every tensor replaced by a name, under which it is put into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{path}: expected text keys, got {wrong[0]!r}")
        return {key: _take_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    return [_put_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def to_disk(path: Path) -> None:
    """Files are in their folder, and their bytes on the disk, before a rename makes them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
