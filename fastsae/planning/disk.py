"""Bytes on the disk: coders, training states, and how many of each a run keeps."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TrainConfig
from ..training_state import KEPT
from .kept import Kept


@dataclass(frozen=True)
class Disk:
    """A run's folder, in bytes; file headers and JSON are left out (a few kB per coder)."""

    coders: int
    """Every coder once: what is left to use."""

    state: int
    """A training state: coders, optimizer states and counters."""

    running: int
    """While the run lasts: the states kept to resume from, and the coders of all checkpoints kept."""

    saving: int
    """At most, while a checkpoint is written beside those it replaces."""

    finished: int
    """When the run is over: coders of all checkpoints kept."""


def disk(whole: Kept, largest: int, cfg: TrainConfig, saves: int) -> Disk:
    """``whole``: of all coders; ``largest``: bytes of the largest coder; ``saves``: checkpoints in the whole run."""
    state = whole.weights + whole.optimizer + 8 * whole.counters // 9  # a run saves ages, not who fired in a step
    steps = min(cfg.keep_last, saves) if cfg.keep_last > 1 else 0
    copies = 1 + steps + cfg.save_best
    finished = copies * whole.weights
    states = min(KEPT, saves)
    running = states * state + finished
    beside = max(state if saves else 0, largest, whole.weights if steps else 0)
    return Disk(whole.weights, state, running, running + beside, finished)
