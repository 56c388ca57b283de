"""How many bytes the CPU's step and encoder allocate at most: their code, counted tensor by tensor.

Shapes: N tokens, D width in, E width out, L latents, K slots per token, P = N · K pairs; n rows of a chunk, R rows of a
block. A test compares with what torch's allocator saw.
"""

from __future__ import annotations

import torch

from .cpu import chunk_rows
from .cpu_screen import pays
from .cpu_select import GROUP
from .cpu_step import BLOCK_BYTES
from .step_sizes import FLOAT, INDEX, Sizes, kept_index

UPDATES = {"adam": 0, "signum": 2, "adam8bit": 6.25}
"""Temporaries of a rule, in gradients of the block being updated (``rules.update_rows``); 8 bits: also the codes."""

AGAIN = 2.5
"""Candidates of a chunk's token with the most that screening scores again, in k: up to the data, this is usual."""


def screens(s: Sizes) -> bool:
    """Whether the encoder ranks in bfloat16 first."""
    x = torch.empty(s.tokens, s.d_in, device="meta")
    return not s.groupmax and 2 * s.slots <= s.latents and pays(x, x.new_empty(s.latents, s.d_in), s.slots)


def scratch(s: Sizes) -> int:
    """What a thread keeps for its next encoding: the weights in bfloat16, and a chunk's scores."""
    if not screens(s):
        return 0
    return 2 * s.latents * (s.d_in + min(chunk_rows(torch.bfloat16, s.tokens, s.latents), s.tokens))


def encoding(s: Sizes) -> int:
    """Beyond x and :func:`scratch`, the activations and indices it returns included."""
    narrow = s.dtype != torch.float32
    wide_weight = FLOAT * s.latents * s.d_in + s.rows(s.d_in) if narrow else 0
    casting = (FLOAT + s.dtype.itemsize) * s.latents * s.d_in if narrow else 0
    out = s.pairs * (FLOAT + INDEX)
    if screens(s):
        return max(casting, wide_weight + out + _ranking(s))
    n = min(chunk_rows(torch.float32, s.tokens, s.latents), s.tokens)
    return max(casting, wide_weight + out + n * (FLOAT * s.latents + (0 if s.groupmax else _selecting(s))))


def _selecting(s: Sizes) -> int:
    """Of a chunk's row, beside its scores."""
    width, top = s.latents // GROUP, (FLOAT + INDEX) * (s.slots + 1)
    ordering = s.slots * (2 * (FLOAT + INDEX) + 3 * INDEX)  # the k best as ranks, and the ranks' own temporaries
    if 2 * s.slots > width:
        return top + ordering
    candidates = GROUP * s.slots + s.latents % GROUP
    return max(FLOAT * width + 2 * top, top + candidates * (FLOAT + INDEX) + ordering)


def _ranking(s: Sizes) -> int:
    """Of a chunk: groups' maxima and a look at each, errors of rounding, and the candidates that are scored again."""
    n = min(chunk_rows(torch.bfloat16, s.tokens, s.latents), s.tokens)
    width = s.latents // GROUP if 2 * s.slots <= s.latents // GROUP else s.latents
    looked, errors = (1 + INDEX) * width, 2 * FLOAT * s.d_in
    again = round(AGAIN * s.slots * (2 * (FLOAT + INDEX) + 5 * INDEX))  # scores and columns, joined, and their ranks
    return n * (2 * s.d_in + 2 * width + max(looked, errors, again))


def variance(s: Sizes) -> int:
    """The losses' denominator (``fastsae.loss.total_variance``)."""
    return (2 if s.dtype == torch.float32 else 3) * s.rows(s.d_out)


def step(s: Sizes, rule: str | None) -> int:
    """A step beyond x, the target and :func:`scratch`; ``rule`` updates rows in it, None: dense gradients."""
    wide, centered, selection = s.rows(s.d_out), s.centered_bytes, s.selection_bytes
    goal = wide if s.skip else 0
    narrow = s.dtype != torch.float32
    losses = max(2 if s.wide else 1, s.prefixes)
    residual = losses * wide
    copies = FLOAT * s.latents * s.d_out if narrow else 0
    phases = (
        centered + encoding(s),
        centered + selection + 2 * goal,
        centered + selection + goal + copies + (2 * losses if losses > 1 else 1 + 3 * narrow) * wide,  # decoding
        centered + selection + goal + residual + (wide + FLOAT * s.d_in * s.d_out if s.skip else 0),
        centered + selection + goal + residual + copies + _by_latent(s),
        centered + selection + goal + residual + copies + kept_index(s) + _backward(s, rule),
    )
    return max(phases)


def _by_latent(s: Sizes) -> int:
    return s.pairs * (2 * FLOAT + FLOAT + INDEX) + 3 * INDEX * s.latents


def _backward(s: Sizes, rule: str | None) -> int:
    """Slopes of all pairs, then blocks of latents: both gradients, and what the update of one makes."""
    slopes = s.pairs * FLOAT
    picking = s.pairs * (1 + 5 * INDEX + FLOAT)
    pairs = slopes + s.pairs * ((3 if s.wide else 2) * INDEX + 2 * FLOAT)
    R = min(s.latents, max(1, BLOCK_BYTES // (FLOAT * max(s.d_in, s.d_out))))
    encoder, decoder = FLOAT * R * s.d_in, FLOAT * R * s.d_out
    update = 0 if rule is None else max(
        UPDATES[rule] * encoder, max(UPDATES[rule], 1 if s.unit_rows else 0) * decoder
    )  # fmt: skip
    return max(slopes + picking, pairs + encoder + decoder + round(update))


def forward(s: Sizes) -> int:
    """``FastSae.forward`` without gradients, beyond x and :func:`scratch`."""
    wide = s.rows(s.d_out)
    return max(variance(s), s.centered_bytes + encoding(s), s.selection_bytes + (4 if s.skip else 3) * wide)
