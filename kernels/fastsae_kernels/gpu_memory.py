"""How many bytes a step of the Triton kernels allocates at most: their launchers' tensors, counted.

Shapes: N tokens, D width in, E width out, L latents, K slots per token, P = N · K pairs. A test compares with
``torch.cuda.max_memory_allocated`` where there is a GPU. What the allocator reserves beyond is not counted.
"""

from __future__ import annotations

import torch

from .by_latent import chunk_size
from .center import BLOCK_D, BLOCK_N
from .configs import CHUNK_BYTES, default_encode, list_length
from .encoder_choice import choose_for_family
from .gpu import gpu_family
from .sparse_configs import latent_step_config
from .step_sizes import FLOAT, INDEX, Sizes, kept_index

SORTED = 3 * FLOAT + 2 * INDEX
"""Bytes per pair while pairs are sorted by latent: keys and their order, both with a buffer of the sort's own."""


def _family() -> str:
    """This machine's GPU's, or an H100's."""
    return gpu_family(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"


def scratch(_s: Sizes) -> int:
    """Kept between steps: nothing."""
    return 0


def variance(s: Sizes) -> int:
    """The losses' denominator: the targets' mean, and a sum per tile."""
    return FLOAT * (s.d_out + -(-s.tokens // BLOCK_N) * -(-s.d_out // BLOCK_D))


def encoding(s: Sizes) -> int:
    """Beyond x, the activations and indices it returns included; narrow weights are the optimizer's copies."""
    family = _family()
    activation = "groupmax" if s.groupmax else "topk"
    path = choose_for_family(s.d_in, s.latents, s.slots, s.dtype, family, activation)
    if path == "fused" and s.groupmax:
        return s.selection_bytes
    config = default_encode(s.d_in, s.latents, s.dtype, family)
    row = 2 * FLOAT * config.num_groups(s.latents) if path == "fused" else FLOAT * s.latents
    chunk = min(CHUNK_BYTES, s.tokens * row)
    lists = 0 if s.groupmax else chunk // row * INDEX * list_length(s.slots, config.GROUP)
    return s.selection_bytes + chunk + lists


def step(s: Sizes, rule: str | None) -> int:
    """A step beyond x and the target; ``rule`` updates rows in it, None: dense gradients that are there already."""
    wide = s.rows(s.d_out, s.dtype.itemsize)
    goal = s.rows(s.d_out, s.dtype.itemsize) if s.skip else 0
    losses = max(2 if s.wide else 1, s.prefixes)
    held = s.centered_bytes + s.selection_bytes + goal + losses * wide
    return max(
        s.centered_bytes + encoding(s),
        held + 2 * goal + (2 * s.rows(s.d_out) + s.rows(s.d_in) if s.skip else 0),
        held + s.pairs * SORTED + 3 * INDEX * s.latents,
        held + kept_index(s) + _backward(s, rule),
    )


def _backward(s: Sizes, rule: str | None) -> int:
    """Partial rows of hot latents, and in one kernel a row of ``W_encᵀ d_bias`` per program, or else all gradients."""
    chunks = s.pairs // chunk_size(s.pairs) * FLOAT * (s.d_in + s.d_out + 1)
    if rule is None or s.d_in != s.d_out:
        return chunks + FLOAT * s.latents * (s.d_in + s.d_out + 1) + s.pairs * FLOAT
    family = _family()
    programs = -(-s.latents // latent_step_config(s.d_in, family).LATENTS)
    return chunks + FLOAT * s.latents + (FLOAT * programs * s.d_in if s.centered else 0)


def forward(s: Sizes) -> int:
    """``FastSae.forward`` without gradients, beyond x, in the coder's own float32."""
    weights = s.dtype.itemsize * s.latents * s.d_in if s.dtype.itemsize < FLOAT else 0  # rounded for the product
    return max(
        variance(s),
        s.centered_bytes + weights + encoding(s),
        s.selection_bytes + (4 if s.skip else 3) * s.rows(s.d_out),
    )
