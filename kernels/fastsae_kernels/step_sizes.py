"""A training step's sizes, as the counts of its memory take them.

Shapes: N tokens, K slots per token, L latents. Bytes: sums and activations are float32, indices int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT, INDEX = 4, 8


class Sizes(NamedTuple):
    """A step's sizes."""

    tokens: int
    d_in: int
    d_out: int
    latents: int
    slots: int
    """Selected latents per token, of the widest TopK."""
    dtype: torch.dtype = torch.float32
    """Of the activations."""
    centered: bool = True
    """Encodes x - b_dec: an autoencoder."""
    skip: bool = False
    wide: bool = False
    """With the Multi-TopK loss."""
    groupmax: bool = False
    unit_rows: bool = True
    """Keeps its decoder's rows at norm 1."""
    prefixes: int = 0
    """Of Matryoshka's, all latents included; 0: none."""

    @property
    def pairs(self) -> int:
        return self.tokens * self.slots

    def rows(self, width: int, itemsize: int = FLOAT) -> int:
        """Bytes of a row of ``width`` numbers for every token."""
        return self.tokens * width * itemsize

    @property
    def centered_bytes(self) -> int:
        """What the encoder sees, where it is another tensor than x."""
        return self.rows(self.d_in, self.dtype.itemsize) if self.centered else 0

    @property
    def selection_bytes(self) -> int:
        """Activations and indices."""
        return self.pairs * (FLOAT + INDEX)


def kept_index(s: Sizes) -> int:
    """The latent -> token index (``by_latent``), while the backward pass goes by it."""
    return s.pairs * INDEX + s.pairs // 64 * INDEX + 2 * INDEX * s.latents
