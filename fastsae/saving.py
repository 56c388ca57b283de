"""Where a run's coders are saved: the newest in its folder, earlier ones under steps/, the best under best/."""

from __future__ import annotations

from pathlib import Path

from .retention import keep_last, save_if_best, save_step
from .sae import FastSae


def save_coders(run: Path, coders: dict[str, FastSae]) -> None:
    """Write coders, with the weights they have now, into ``run/NAME``."""
    for name, coder in coders.items():
        coder.save_to_disk(run / name)


def keep_checkpoint(run: Path, coders: dict[str, FastSae], step: int, count: int) -> None:
    """Write coders into ``run/steps/STEP`` too, where more than one (``count``) checkpoint is kept, and drop old ones.

    Doing it again for the same step, after a crash, changes nothing.
    """
    if count > 1:
        save_step(run, step, lambda folder: save_coders(folder, coders))
        keep_last(run, count)


def keep_best(run: Path, coders: dict[str, FastSae], step: int, held_out: dict[str, dict[str, float]]) -> None:
    """Write those coders into ``run/best/NAME`` whose held-out FVU is lower than ever before."""
    for name, coder in coders.items():
        save_if_best(run, name, held_out[name]["fvu"], step, coder.save_to_disk)
