"""What a coder was trained on, and whether that is what it is used on.

A coder on activations that it was not trained on gives numbers that look like a bad coder's, and no error: so its
notes in cfg.json say which model, hookpoint and activations it knows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import demo

NORM_RATIO = 1.5
"""Mean norms that differ by more than this factor are of different activations."""

MEAN_SHARE = 0.25
"""So are means that differ by more than this share of the mean norm."""


@dataclass(frozen=True)
class Origin:
    """Where activations come from, and how large they are; None is unknown."""

    model: str | None = None
    """Hub id or folder of the model."""

    revision: str | None = None
    """Its revision on the hub."""

    hookpoint: str | None = None
    """Module whose activations they are."""

    width: int | None = None
    """Their width D."""

    activation_mean: float | None = None
    """Norm of their mean, ‖mean_n y_n‖₂."""

    activation_norm: float | None = None
    """Mean of their norms, mean_n ‖y_n‖₂."""

    def to_notes(self) -> dict[str, Any]:
        """What is known, for a coder's notes."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> Origin:
        """From a coder's notes, which may be a stranger's: what has another type is unknown."""
        kinds = {"width": int, "activation_mean": (int, float), "activation_norm": (int, float)}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: notes[name] for name in names if isinstance(notes.get(name), kinds.get(name, str))})


def misfits(trained: Origin, here: Origin) -> list[str]:
    """What of ``here`` a coder does not fit that was ``trained`` elsewhere, in words, with numbers; [] if all fits.

    What either does not know is not compared.
    """
    found = []
    if trained.hookpoint and here.hookpoint and trained.hookpoint != here.hookpoint:
        found.append(f"expected a coder of this hookpoint ({here.hookpoint}), got one trained on {trained.hookpoint}")
    if trained.model and here.model and not same_model(trained.model, here.model):
        found.append(f"expected a coder of {here.model}, got one trained on {trained.model}")
    elif trained.revision and here.revision and trained.revision != here.revision:
        found.append(f"expected a coder of revision {here.revision}, got one trained on {trained.revision}")
    if trained.width and here.width and trained.width != here.width:
        found.append(f"expected a coder of width {here.width}, got one of width {trained.width}")
    return found + _other_size(trained, here)


def _other_size(trained: Origin, here: Origin) -> list[str]:
    if not (trained.activation_norm and here.activation_norm):
        return []
    found = []
    ratio = here.activation_norm / trained.activation_norm
    if not 1 / NORM_RATIO <= ratio <= NORM_RATIO:
        found.append(
            f"expected activations of mean norm {trained.activation_norm:.4g}, as in training, "
            f"got {here.activation_norm:.4g} ({ratio:.2g} times)"
        )
    if trained.activation_mean is not None and here.activation_mean is not None:
        difference = abs(here.activation_mean - trained.activation_mean)
        if not difference <= MEAN_SHARE * trained.activation_norm:
            found.append(
                f"expected activations whose mean has norm {trained.activation_mean:.4g}, as in training, "
                f"got {here.activation_mean:.4g}"
            )
    return found


def same_model(a: str, b: str) -> bool:
    """Two folders by where they are; hub ids by their last name, which an organisation may stand before."""
    a, b = (str(demo.MODEL_DIR) if name == demo.NAME else name for name in (a, b))
    if Path(a).is_dir() and Path(b).is_dir():
        return Path(a).resolve() == Path(b).resolve()
    return Path(a).name == Path(b).name
