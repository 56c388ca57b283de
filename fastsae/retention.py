"""Which of a run's checkpoints are kept: the last few steps, the best of each coder, and the newest that is whole.

A run's folder: ``HOOK/`` (the newest coders, as sparsify has them), ``steps/N/HOOK/`` (those of step N), and
``best/HOOK/`` with ``best/best.json`` (each coder where its held-out FVU was lowest).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import read_coder
from .coder_folders import find_coders
from .errors import CheckpointError
from .integrity import check_name, write_json

logger = logging.getLogger("fastsae")

STEPS, BEST, BEST_FILE = "steps", "best", "best.json"


def save_step(run: Path, step: int, save: Callable[[Path], Any]) -> Path:
    """Let ``save`` fill a folder, then make it ``steps/N``: a folder of that name is complete, whatever happens.

    Step N that is there already (after a resume) is replaced.
    """
    place = run / STEPS / str(step)
    beside = place.with_name(f"{step}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save(beside)
    if place.exists():
        shutil.rmtree(place)
    beside.rename(place)
    return place


def saved_steps(run: Path) -> list[int]:
    """The steps with a complete checkpoint, ascending."""
    folders = (run / STEPS).glob("*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal() and folder.is_dir())


def keep_last(run: Path, count: int) -> list[int]:
    """Delete all but the last ``count`` checkpoints, and what a crash left unfinished; the steps deleted."""
    if count < 1:
        raise ValueError(f"expected to keep at least 1 checkpoint, got {count}")
    for unfinished in (run / STEPS).glob("*.part"):
        shutil.rmtree(unfinished)
    dropped = saved_steps(run)[:-count]
    for step in dropped:
        shutil.rmtree(run / STEPS / str(step))
    return dropped


def newest_whole(run: Path) -> int | None:
    """The newest step whose coders all read back; damaged ones are named in a warning. None where there is none."""
    for step in reversed(saved_steps(run)):
        try:
            folders = find_coders(run / STEPS / str(step))
            for folder in folders.values():
                read_coder(folder)
        except CheckpointError as error:
            logger.warning("step %d is not used: %s", step, error)
            continue
        if folders:
            return step
        logger.warning("step %d is not used: it holds no coders", step)
    return None


def save_if_best(
    run: Path, name: str, value: float, step: int, save: Callable[[Path], Any], *, measure: str = "fvu"
) -> bool:
    """Let ``save`` write the coder into ``best/NAME`` where ``value`` is lower than any before; whether it is."""
    best = best_so_far(run)
    if not math.isfinite(value) or (name in best and value >= best[name][measure]):
        return False
    save(run / BEST / check_name(name))
    write_json(run / BEST / BEST_FILE, {**best, name: {measure: value, "step": step}})
    return True


def best_so_far(run: Path) -> dict[str, dict[str, Any]]:
    """``{"fvu": ..., "step": ...}`` by coder, end to end with the model's ``loss`` in FVU's place."""
    try:
        return json.loads((run / BEST / BEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{run / BEST / BEST_FILE}: not readable as JSON ({error})") from None
