"""A run's training state on disk: all that the next step depends on, whole or not at all, without pickle.

    RUN/state/step-N/...         the files of :mod:`.state_files`
    RUN/state/step-N/part-R/...  the same of each process, where coders are spread over several

A folder of that name is complete: it is filled beside, brought to the disk, and renamed. The last two are kept,
so that there is one to go on from when the newest turns out damaged.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ArtifactError, CheckpointError, first_line
from .state_files import read_files, to_disk, write_files

logger = logging.getLogger("fastsae")

STATE = "state"
KEPT = 2
PART = "part-"


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
        write_files(folder, state, parts)


def end_state(run: Path, step: int) -> None:
    """Make the parts count, all together; older states go. By one process, when all have written."""
    place = run / STATE / f"step-{step}"
    with _written(run, step):
        if place.exists():
            shutil.rmtree(place)
        _beside(run, step).rename(place)
        to_disk(place.parent)
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
            f"output: could not write {run / STATE / f'step-{step}'}: {first_line(error)}; what was "
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


def _read_parts(folder: Path) -> list[dict[str, Any]]:
    found = sorted(folder.glob(f"{PART}*"), key=lambda part: int(part.name.removeprefix(PART))) or [folder]
    return [read_files(part, len(found)) for part in found]
