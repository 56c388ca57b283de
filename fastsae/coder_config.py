"""What a coder is: its shape, activation and loss terms.

Shapes: D width in, E width out, L latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from .errors import ConfigError
from .fields import check_types, require


@dataclass(frozen=True)
class SaeConfig:
    """Configuration of one sparse coder; the names are sparsify's."""

    activation: Literal["topk", "groupmax", "batchtopk"] = "topk"
    """How latents are selected: the k largest, the largest of each of k groups, or k per token on a batch's average."""

    expansion_factor: int = 32
    """Number of latents as a multiple of the input width."""

    normalize_decoder: bool = True
    """Keep every decoder row at unit norm (SAEs only; a transcoder's decoder starts at zero)."""

    num_latents: int = 0
    """Number of latents; 0 means width times expansion factor."""

    k: int = 32
    """Number of active latents per token."""

    multi_topk: bool = False
    """Add the Multi-TopK loss: 1/8 of the FVU reached with 4k latents."""

    skip_connection: bool = False
    """Add a linear map from the input to the output."""

    transcode: bool = False
    """Predict a module's output from its input, instead of reconstructing its output."""

    matryoshka_widths: tuple[int, ...] = ()
    """Numbers of first latents that each reconstruct by themselves, beside all (Matryoshka); the loss is the mean."""

    def __post_init__(self) -> None:
        if isinstance(self.matryoshka_widths, list):
            object.__setattr__(self, "matryoshka_widths", tuple(self.matryoshka_widths))
        check_types(self)
        widths = self.matryoshka_widths
        ascending = list(widths) == sorted({0, *widths})[1:]
        require(ascending, "matryoshka_widths", "ascending numbers of latents above 0", widths)
        require(self.k >= 1, "k", "at least 1", self.k)
        require(self.expansion_factor >= 1, "expansion_factor", "at least 1", self.expansion_factor)
        require(self.num_latents >= 0, "num_latents", "0 (derived) or more", self.num_latents)
        if self.multi_topk and (self.activation == "batchtopk" or widths):
            other = "batchtopk, whose k is a mean" if self.activation == "batchtopk" else "Matryoshka widths"
            raise ConfigError(f"multi_topk: expected topk or groupmax of one width with it, got {other}; drop one")
        if self.num_latents:
            self.check_latents(self.num_latents)

    def prefixes_for(self, num_latents: int) -> tuple[int, ...]:
        """Matryoshka's prefixes, the last of them all ``num_latents``; () without any."""
        widths = self.matryoshka_widths
        return widths if not widths or widths[-1] == num_latents else (*widths, num_latents)

    def latents_for(self, d_in: int) -> int:
        """Number of latents on a width of ``d_in``; raises :class:`ConfigError` where k does not fit."""
        num_latents = self.num_latents or d_in * self.expansion_factor
        self.check_latents(num_latents)
        return num_latents

    def k_aux_for(self, width: int) -> int:
        """Dead latents that AuxK takes per token on a reconstruction of ``width``.

        The power of two closest to half of it (Gao et al. 2024, arXiv 2406.04093, appendix A.2: 512 for GPT-2's 768).
        """
        return 2 ** max(0, round(math.log2(width / 2)))

    def output_width(self, d_in: int, d_out: int | None) -> int:
        """``d_out``, by default ``d_in``; raises :class:`ConfigError` for an autoencoder with two widths."""
        if d_out is None or d_out == d_in:
            return d_in
        if not self.transcode:
            raise ConfigError(
                f"d_out: expected {d_in}, the width that an autoencoder encodes, got {d_out}; "
                "only a transcoder (transcode=True) has two widths"
            )
        return d_out

    def check_latents(self, num_latents: int) -> None:
        needed = 4 * self.k if self.multi_topk else self.k
        what = "4k (Multi-TopK)" if self.multi_topk else "k"
        if needed > num_latents:
            raise ConfigError(
                f"expected {what} <= number of latents, got {what} = {needed} and {num_latents} latents; "
                "lower --k or raise --expansion-factor or --num-latents"
            )
        if self.matryoshka_widths and self.matryoshka_widths[-1] > num_latents:
            raise ConfigError(
                f"matryoshka_widths: expected at most the {num_latents} latents there are, got "
                f"{self.matryoshka_widths[-1]}; lower it or raise --expansion-factor or --num-latents"
            )
        if self.activation == "groupmax" and num_latents % self.k:
            raise ConfigError(
                f"groupmax expects a number of latents divisible by k, got {num_latents} latents and k = {self.k}; "
                f"try --k {_nearest_divisor(num_latents, self.k)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SaeConfig:
        """From a ``cfg.json``'s keys: unknown ones are ignored, missing ones take the defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


TranscoderConfig = partial(SaeConfig, transcode=True)


def _nearest_divisor(n: int, k: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - k))
