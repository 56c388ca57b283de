"""What to plan for: the options of ``fastsae plan`` beside those of ``fastsae train``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError
from ..fields import check_types, require

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


@dataclass(frozen=True)
class PlanConfig:
    """What is planned for."""

    memory: str | None = None
    """Memory per device to fit into, such as 80GiB; by default what this machine's device has."""

    ranks: int = 1
    """Processes (torchrun) to plan for, one per device."""

    bench: str | None = None
    """File that fastsae bench --json wrote on the device that will train: the speed is worked out from it."""

    measure: bool = False
    """Take a few steps on this machine, with random weights, to know the speed."""

    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.ranks >= 1, "ranks", "at least 1", self.ranks)
        self.memory_bytes()
        if self.measure and self.bench is not None:
            raise ConfigError("expected measure or bench, got both; drop one of them")

    def memory_bytes(self) -> int | None:
        """``memory`` in bytes."""
        if self.memory is None:
            return None
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", self.memory.lower())
        unit = found and (found[2] if found[2].endswith("b") or not found[2] else f"{found[2]}b")
        if not found or unit not in _UNITS or float(found[1]) == 0:
            raise ConfigError(f"memory: expected a size such as 24GiB or 80GB, got {self.memory!r}")
        return int(float(found[1]) * _UNITS[unit])
