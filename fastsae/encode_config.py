"""What ``fastsae encode`` shows."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import check_types, require


@dataclass(frozen=True)
class EncodeConfig:
    """What to show of a text's latents."""

    text: str = ""
    """The text to encode."""

    hookpoints: tuple[str, ...] = ()
    """Coders to take: names or wildcards; by default all."""

    top: int = 5
    """Latents to show per token, the strongest first."""

    json: bool = False
    """Print JSON instead of tables."""

    force: bool = False
    """Encode with coders on a model or hookpoint that they were not trained on."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.text != "", "text", 'some text: --text "..."', self.text)
        require(self.top >= 1, "top", "at least 1", self.top)
