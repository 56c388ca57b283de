"""What to evaluate, and how: the options of ``fastsae eval``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..fields import check_types, require


@dataclass(frozen=True)
class EvalConfig:
    """How coders are evaluated."""

    hookpoints: tuple[str, ...] = ()
    """Coders to take: names or wildcards; by default all."""

    compare: tuple[str, ...] = ()
    """More folders or hub ids of coders, evaluated side by side."""

    ce: bool = True
    """Measure the model's loss with coders grafted in, which takes several passes of the whole model."""

    sequences: int = 64
    """Sequences to evaluate on, where the run does not say which it held out."""

    batch_size: int = 8
    """Sequences per forward of the model."""

    exclude_tokens: tuple[int, ...] = ()
    """Token ids, or names as for train, that are left as they are, unmeasured; by default those training left out."""

    dense_above: float = 0.1
    """Share of tokens that a latent must fire on to count as dense."""

    force: bool = False
    """Evaluate coders on a model or hookpoint that they were not trained on."""

    output: str | None = None
    """File that the numbers go to; by default eval.json in the folder of the coders."""

    def __post_init__(self) -> None:
        for name in ("hookpoints", "compare", "exclude_tokens"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        for name in ("sequences", "batch_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if not 0 < self.dense_above <= 1:
            raise ConfigError(f"dense_above: expected a share above 0 and at most 1, got {self.dense_above}")
