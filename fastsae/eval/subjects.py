"""Coders under test, and those that can stand in a model together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sae import FastSae

Coders = Mapping[str, FastSae]


class Subject(NamedTuple):
    """One coder under test."""

    source: str
    name: str
    coder: FastSae

    @property
    def hookpoint(self) -> str:
        return self.name.partition("/")[0]

    @property
    def decoder(self) -> Tensor:
        """W_dec [L, D]; raises :class:`CheckpointError` where there is none."""
        if self.coder.W_dec is None:
            raise CheckpointError(f"{self.name}: expected a coder with its decoder, got one loaded with decoder=False")
        return self.coder.W_dec

    @property
    def group(self) -> tuple[str, str]:
        """Coders that can be grafted together: of one source and one seed."""
        return self.source, self.name.partition("/")[2]


def make_subjects(coders: Coders | Mapping[str, Coders], device: torch.device) -> list[Subject]:
    """From one mapping of names to coders, or several by a label; moved to ``device``."""
    if not coders:
        raise CheckpointError("coders: expected at least one coder to evaluate, got none")
    if all(isinstance(value, FastSae) for value in coders.values()):
        coders = {"": coders}  # type: ignore[dict-item]
    sources: Mapping[str, Coders] = coders  # type: ignore[assignment]
    return [
        Subject(source, name, coder.to(device)) for source, group in sources.items() for name, coder in group.items()
    ]


def make_groups(subjects: Iterable[Subject]) -> dict[tuple[str, str], dict[str, FastSae]]:
    """Coders by hookpoint, of every group that has more than one."""
    groups: dict[tuple[str, str], dict[str, FastSae]] = defaultdict(dict)
    for subject in subjects:
        groups[subject.group][subject.hookpoint] = subject.coder
    return {group: coders for group, coders in groups.items() if len(coders) > 1}
