"""What to cache, and how: the options of ``fastsae cache``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..fields import check_types, require


@dataclass(frozen=True)
class CacheConfig:
    """What is cached, and how."""

    hookpoints: tuple[str, ...] = ()
    """Modules whose outputs to store: names or wildcards; by default every layer's residual stream."""

    inputs: bool = False
    """Store the modules' inputs too, which transcoders are trained on."""

    storage: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision on disk; float32 trains exactly as on the fly does with a float32 model."""

    exclude_tokens: tuple[int, ...] = ()
    """Token ids that are not stored; on the command line also by name: bos, eos, pad, special."""

    batch_size: int = 8
    """Sequences per forward of the model."""

    shard_mib: int = 512
    """Size of a file, about; so much is held in memory while it is filled."""

    output: str = "activations"
    """Folder to write; a cache that was cut off there goes on where it stopped."""

    yes: bool = False
    """Write without asking."""

    def __post_init__(self) -> None:
        for name in ("hookpoints", "exclude_tokens"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        for name in ("batch_size", "shard_mib"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
