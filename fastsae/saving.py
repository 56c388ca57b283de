"""Where a run's coders are saved: the newest in its folder."""

from __future__ import annotations

from pathlib import Path

from .config import TrainConfig
from .sae import FastSae


def save_coders(
    run: Path, coders: dict[str, FastSae], step: int, cfg: TrainConfig,
    held_out: dict[str, dict[str, float]] | None, *, is_checkpoint: bool,
) -> None:  # fmt: skip
    """Write coders, with the weights they have now, into ``run/NAME``.

    Doing it again for the same step changes nothing.
    """
    for name, coder in coders.items():
        coder.save_to_disk(run / name)
