"""What a plan says: numbers, in bytes, tokens and seconds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .disk import Disk
from .kept import Kept


@dataclass(frozen=True)
class CoderPlan:
    """One coder of the run."""

    name: str
    module: str
    """Class of the module that it sits on."""
    d_in: int
    d_out: int
    num_latents: int
    k: int
    parameters: int
    kept: Kept
    """Bytes of the whole coder, on however many ranks it lies."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds the most."""

    model: int
    kept: Kept
    """Of the coders there, or parts of them."""
    buffers: int
    """What else stays: tokens held to be shuffled, memory kept for the next step's products."""
    activations: int
    """Of the model's forward at the peak."""
    step: int
    """What the work at the peak makes for itself."""
    peak: int
    when: str
    """What is going on at the peak."""
    process: int
    """Of Python and its libraries, which the peak leaves out; 0 on a GPU."""
    available: int | None
    """What there is; None: unknown."""

    @property
    def fits(self) -> bool | None:
        """None where nobody knows."""
        return None if self.available is None else self.peak + self.process <= self.available


@dataclass(frozen=True)
class Tokens:
    """How much a run trains on."""

    per_sequence: int
    sequences: int | None
    """To train on, over all ranks; None: not known before the data is read."""
    held_out: int
    exact: bool
    """Else at most so many."""
    total: int | None
    steps: int | None
    """Optimizer steps."""


@dataclass(frozen=True)
class Speed:
    """How fast a run goes."""

    tokens_per_second: float
    """Of one process."""
    source: str
    """Where the number comes from."""


@dataclass(frozen=True)
class Change:
    """Something that makes a run fit."""

    what: str
    """Options of ``fastsae train``, or words."""
    peak: int
    """Bytes per device with it."""


@dataclass(frozen=True)
class Advice:
    """How to make a run fit into the memory there is."""

    micro_acc_steps: int | None
    """The fewest micro-batches that fit; None: no number of them does, or the memory is unknown."""
    micro_batch: int | None
    """Tokens in each."""
    changes: tuple[Change, ...]
    """Where no number of micro-batches fits: what does, each alone."""


@dataclass(frozen=True)
class Mode:
    """A way to spread the run over its ranks."""

    options: str
    """Of ``fastsae train``; none for replicas."""
    peak: int
    """Bytes on the device that holds the most."""
    fits: bool | None
    link: int
    """Bytes that a rank sends in one optimizer step, at most; a model, not measured."""
    load: float
    """Work of the rank with the most over the mean of all: 1 is even."""
    recommended: bool


@dataclass(frozen=True)
class Plan:
    """What a run will need and take."""

    model: str
    dataset: str
    device: str
    dtype: str
    """The model's."""
    implementation: str
    mode: str
    ranks: int
    model_kind: str
    """The model's class."""
    model_parameters: int
    coders: tuple[CoderPlan, ...]
    memory: Memory
    disk: Disk
    tokens: Tokens
    speed: Speed | None
    """None where nothing was measured."""
    advice: Advice
    modes: tuple[Mode, ...]
    """For several ranks: the ways to spread the run."""

    @property
    def seconds(self) -> float | None:
        """To finish, of one process's run; None where tokens or speed are unknown, or there are several processes."""
        if self.speed is None or self.tokens.total is None or self.ranks > 1:
            return None
        return self.tokens.total / self.speed.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        values["seconds"] = self.seconds
        values["memory"] |= {"kept": self.memory.kept._asdict(), "fits": self.memory.fits}
        for coder, plan in zip(values["coders"], self.coders, strict=True):
            coder["kept"] = plan.kept._asdict()
        return values
