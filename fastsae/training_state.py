"""A run's training state on disk: all that the next step depends on, whole or not at all, without pickle.

    RUN/state/step-N/state.json             numbers, texts, lists, dicts; and the hashes of all files' content
    RUN/state/step-N/tensors-0.safetensors  every tensor in it, byte for byte, in files of about 2 GB
    RUN/state/step-N/part-R/...             the same of each process, where coders are spread over several

A folder of that name is complete: it is filled beside, brought to the disk, and renamed. The last two are kept,
so that there is one to go on from when the newest turns out damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ArtifactError, CheckpointError
from .integrity import sha256

logger = logging.getLogger("fastsae")

STATE = "state"
KEPT = 2
FORMAT = 2
STATE_FILE = "state.json"
PART = "part-"
SHARD_BYTES = 2 << 30  # held in memory beside the tensors' own while they are written
_TENSOR = "__tensor__"


def write_state(run: Path, step: int, state: dict[str, Any]) -> None:
    """Save ``state`` (plain values and tensors, with text keys) as the one after ``step``; older ones go.

    Raises :class:`ArtifactError` where it cannot be written (a full disk); what was saved before is left alone.
    """
    begin_state(run, step)
    write_part(run, step, state)
    end_state(run, step)


def begin_state(run: Path, step: int) -> None:
    """Make room for the parts of the state after ``step``, which one process or several write; by one of them."""
    beside = _beside(run, step)
    with _written(run, step):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)


def write_part(run: Path, step: int, state: dict[str, Any], number: int = 0, parts: int = 1) -> None:
    """Write part ``number`` of ``parts``; the part that does not fit is deleted with all others."""
    folder = _beside(run, step)
    with _written(run, step):
        if parts > 1:
            folder = folder / f"{PART}{number}"
            folder.mkdir()
        _write_files(folder, state, parts)


def end_state(run: Path, step: int) -> None:
    """Make the parts count, all together; older states go. By one process, when all have written."""
    place = run / STATE / f"step-{step}"
    with _written(run, step):
        if place.exists():
            shutil.rmtree(place)
        _beside(run, step).rename(place)
        _to_disk(place.parent)
    kept = {folder for _, folder in _saved(run)[-KEPT:]} | {place}
    for folder in place.parent.glob("step-*"):
        if folder not in kept:
            shutil.rmtree(folder)


def _beside(run: Path, step: int) -> Path:
    return run / STATE / f"step-{step}.part"


@contextmanager
def _written(run: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_beside(run, step), ignore_errors=True)
        raise ArtifactError(
            f"output: could not write {run / STATE / f'step-{step}'}: {str(error).strip().splitlines()[0]}; what was "
            f"saved before is still there. Free some space, then: fastsae train --resume {run}"
        ) from None


def read_newest_state(run: Path) -> tuple[int, list[dict[str, Any]]]:
    """(step, its parts) of the newest state that is whole; damaged ones are named in a warning, and deleted.

    Raises :class:`CheckpointError` where there is none.
    """
    check_has_state(run)
    damaged = []
    for step, folder in reversed(_saved(run)):
        try:
            parts = _read_parts(folder)
        except CheckpointError as error:
            damaged.append(folder)
            logger.warning("not used: %s", error)
            continue
        if damaged:
            logger.warning("going on from step %d, the newest that is whole", step)
        for other in damaged:
            shutil.rmtree(other)
        return step, parts
    raise CheckpointError(f"resume: expected a whole training state in {run / STATE}, got damaged ones only")


def has_state(run: Path) -> bool:
    """Whether there is something to go on from."""
    return bool(_saved(run))


def check_has_state(run: Path) -> None:
    """Raise :class:`CheckpointError` where there is nothing to go on from."""
    if not has_state(run):
        raise CheckpointError(
            f"resume: expected a training state in {run / STATE}, found none: the run is finished, or ended before its "
            "first --save-every; finished coders can be trained on with --finetune"
        )


def drop_states(run: Path) -> None:
    """Delete the training states of a run that is finished."""
    shutil.rmtree(run / STATE, ignore_errors=True)


def _saved(run: Path) -> list[tuple[int, Path]]:
    folders = [folder for folder in (run / STATE).glob("step-*") if folder.name[5:].isdecimal()]
    return sorted((int(folder.name[5:]), folder) for folder in folders)


def _write_files(folder: Path, state: dict[str, Any], parts: int) -> None:
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    hashes = {}
    for i, shard in enumerate(_shards(tensors)):
        path = folder / f"tensors-{i}.safetensors"
        save_file({name: tensors[name].detach().cpu().contiguous() for name in shard}, path)
        _to_disk(path)
        hashes[path.name] = sha256(path)
    record = {"format": FORMAT, "parts": parts, "state_sha256": _hash(plain), "tensors_sha256": hashes}
    (folder / STATE_FILE).write_text(json.dumps({**record, "state": plain}), encoding="utf-8")
    _to_disk(folder / STATE_FILE)
    _to_disk(folder)


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


def _read_parts(folder: Path) -> list[dict[str, Any]]:
    found = sorted(folder.glob(f"{PART}*"), key=lambda part: int(part.name.removeprefix(PART))) or [folder]
    return [_read_files(part, len(found)) for part in found]


def _read_files(folder: Path, parts: int) -> dict[str, Any]:
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


def _to_disk(path: Path) -> None:
    """Files are in their folder, and their bytes on the disk, before a rename makes them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
