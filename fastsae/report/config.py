"""What a report shows: the options of ``fastsae report``."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import check_types, require


@dataclass(frozen=True)
class ReportConfig:
    """What a report shows."""

    hookpoints: tuple[str, ...] = ()
    """Coders to show: names or wildcards; by default all."""

    latents: tuple[int, ...] = ()
    """Latents to show of every coder, beside those chosen."""

    per_coder: int = 48
    """Latents to choose per coder, spread evenly from the rarest to the densest."""

    contexts: int = 8
    """Contexts to show per latent: the strongest of as many sequences."""

    look_at: int = 65_536
    """Tokens to search for contexts: those held out, then others of the run's data."""

    batch_size: int = 8
    """Sequences per forward of the model."""

    force: bool = False
    """Report on coders on a model or hookpoint that they were not trained on."""

    output: str | None = None
    """File to write; by default report.html in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("hookpoints", "latents"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        for name in ("contexts", "look_at", "batch_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.per_coder >= 0, "per_coder", "0 or more", self.per_coder)
