"""The numbers that an evaluation gives, with what they mean."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import write_json
from ..version import __version__
from .estimate import Estimate


@dataclass(frozen=True)
class Density:
    """How often latents fire: the share of tokens on which each is active."""

    latents: int
    dead: int
    """Latents that never fired on the evaluated tokens."""
    dense: int
    """Latents that fired on more than ``dense_above`` of them."""
    dense_above: float
    log10_edges: tuple[float, ...]
    """Edges of the histogram's bins, log10 of the density."""
    counts: tuple[int, ...]
    """Latents per bin; dead ones are in none."""


@dataclass(frozen=True)
class DecoderCosines:
    """The largest cosine of a decoder row with any other row, over ``rows`` rows."""

    rows: int
    mean: float
    median: float
    p99: float
    largest: float
    above_90: float
    """Share of rows with another row closer than a cosine of 0.9."""


@dataclass(frozen=True)
class Reconstruction:
    """What a coder does on its own."""

    tokens: int
    sequences: int
    fvu: Estimate
    """Fraction of variance unexplained, against the mean of all tokens; 0 is perfect, 1 is the mean."""
    l0: Estimate
    """Active latents per token."""
    density: Density


@dataclass(frozen=True)
class CrossEntropy:
    """What the model does with activations replaced; losses in nats per predicted token."""

    clean: Estimate
    grafted: Estimate
    """The coder's output in place of the module's."""
    zero: Estimate
    """Zeros in place of the module's output."""
    mean: Estimate
    """The module's mean output in place of its output."""
    recovered: Estimate
    """(zero - grafted) / (zero - clean): 1 is as good as the model, 0 as bad as zeros."""
    recovered_from_mean: Estimate
    """(mean - grafted) / (mean - clean)."""
    kl: Estimate
    """KL(clean || grafted) of the predicted distributions, nats per token."""
    kl_zero: Estimate
    """KL(clean || zero)."""


@dataclass(frozen=True)
class CoderEvaluation:
    """One coder, alone in the model."""

    coders: str
    """Which folder or hub repository it is from."""
    name: str
    hookpoint: str
    reconstruction: Reconstruction
    decoder: DecoderCosines
    cross_entropy: CrossEntropy | None


@dataclass(frozen=True)
class JointEvaluation:
    """Every coder of a folder (of one seed) grafted into the model at once."""

    coders: str
    names: tuple[str, ...]
    cross_entropy: CrossEntropy


@dataclass(frozen=True)
class Evaluation:
    """What :func:`fastsae.evaluate` returns."""

    model: str
    tokens: int
    """Tokens measured: those left out are not among them."""
    sequences: int
    coders: tuple[CoderEvaluation, ...]
    together: tuple[JointEvaluation, ...]
    """Empty without losses, and for folders of one coder."""
    dataset: str = ""
    """What was evaluated on, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; an estimate is {value, low, high}, a 95 % interval over sequences."""
        values = dataclasses.asdict(self)
        for coder in values["coders"]:
            fvu: Estimate = coder["reconstruction"]["fvu"]
            coder["reconstruction"]["explained_variance"] = fvu.complement()
        return {"fastsae": __version__, **_plain(values)}

    def save(self, path: Path | str) -> None:
        """Write ``eval.json``; NaN, where an interval cannot be had, is null."""
        write_json(Path(path), self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
