"""Numbers with their uncertainty: every measure is a ratio of two sums over sequences.

Shapes: R sequences. All sums are float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Z95 = 1.959964
"""Standard errors that a 95 % interval reaches to each side of a normal mean."""


class Estimate(NamedTuple):
    """A measure and its 95 % confidence interval over sequences; the interval is NaN with fewer than two."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def complement(self) -> Estimate:
        """1 minus this: explained variance from FVU."""
        return Estimate(1 - self.value, 1 - self.high, 1 - self.low)


def ratio(top: Tensor, bottom: Tensor) -> Estimate:  # [R], [R], float64
    """Σ top / Σ bottom over sequences, with the interval of the linearised ratio (delta method).

    Sequences, not tokens, are what was sampled independently: tokens of a sequence depend on each other.
    The interval is the normal approximation; with few sequences it is too narrow.
    """
    count, total = len(top), bottom.sum()
    value = (top.sum() / total).item()
    if count < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan)
    spread = (top - value * bottom).square().sum() * count / (count - 1)
    half = Z95 * (spread.sqrt() / total.abs()).item()
    return Estimate(value, value - half, value + half)
