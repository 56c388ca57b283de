"""Where a run's coders are saved: the newest in its folder, earlier ones under steps/, the best under best/."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .checkpoint import copy_coder
from .retention import keep_last, save_if_best, save_step
from .sae import FastSae


def save_coders(run: Path, coders: dict[str, FastSae]) -> None:
    """Write coders, with the weights they have now, into ``run/NAME``."""
    for name, coder in coders.items():
        coder.save_to_disk(run / name)


def keep_checkpoint(run: Path, names: Iterable[str], step: int, count: int) -> None:
    """Copy saved coders into ``run/steps/STEP`` too, where more than one (``count``) checkpoint is kept; drop old ones.

    Doing it again for the same step, after a crash, changes nothing.
    """

    def copy(folder: Path) -> None:
        for name in names:
            copy_coder(run / name, folder / name)

    if count > 1:
        save_step(run, step, copy)
        keep_last(run, count)


def keep_best(run: Path, step: int, held_out: dict[str, dict[str, float]]) -> None:
    """Copy those saved coders into ``run/best/NAME`` whose held-out FVU (or end to end, loss) is the lowest yet."""
    for name, measured in held_out.items():
        key = "loss" if "loss" in measured else "fvu"
        save = lambda folder, name=name: copy_coder(run / name, folder)  # noqa: E731
        save_if_best(run, name, measured[key], step, save, measure=key)
