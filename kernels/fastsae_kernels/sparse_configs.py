"""Default tile sizes of what goes over the selected latents only: decoding, the backward pass, the optimizer's step.

Shapes: N tokens, D width, L latents, K active latents. A default never depends on N.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from . import gpu

SLAB_BYTES = 8 * 2**20
"""A slab of W_dec should stay in L2 beside everything else: on an H200 with 60 MB, 16 MB were slower than 8."""


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decoder and of its transpose."""

    BLOCK_K: int
    """Rows of W_dec in flight."""

    BLOCK_D: int
    """Width of a slab."""

    num_warps: int


@dataclass(frozen=True)
class LatentGradConfig:
    """Tiles of the latent-major backward."""

    BLOCK_P: int
    """Pairs per iteration."""

    BLOCK_D: int
    """At least D: the whole row in registers. Less: slabs, after a pass of their own for the activations' gradient."""

    num_warps: int

    STAGES: int = 0
    """Iterations that rows of tokens are loaded ahead, through shared memory; 0: none."""


def decode_config(D: int, L: int, k: int, itemsize: int) -> DecodeConfig:
    """Slabs of 128 columns; of 64 where 128 would crowd L2 or leave more than an eighth of its lanes idle."""
    BLOCK_D = min(128, max(16, triton.next_power_of_2(D)))
    if BLOCK_D > 64 and (L * BLOCK_D * itemsize > SLAB_BYTES or -D % BLOCK_D > D // 8):
        BLOCK_D = 64
    return DecodeConfig(min(8, triton.next_power_of_2(k)), BLOCK_D, num_warps=1)


def latent_grad_config(D: int, itemsize: int) -> LatentGradConfig:
    """The whole row in registers up to 8192 columns; beyond, slabs of 4096. Wide float32 rows come one at a time."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    if BLOCK_D <= 1024:
        return LatentGradConfig(1024 // BLOCK_D, BLOCK_D, num_warps=1, STAGES=0 if gpu.interpreting() else 3)
    if itemsize == 2 and BLOCK_D in (2048, 4096) and not gpu.interpreting():
        return LatentGradConfig(1, BLOCK_D, num_warps=BLOCK_D // 512, STAGES=3)
    BLOCK_P = 1 if itemsize == 4 else 2
    if BLOCK_D == 2048:
        return LatentGradConfig(BLOCK_P, BLOCK_D, num_warps=4)
    if BLOCK_D == 8192:
        return LatentGradConfig(1, BLOCK_D, num_warps=16)
    return LatentGradConfig(BLOCK_P, 4096, num_warps=8)


def update_warps(BLOCK_D: int, family: str) -> int:
    """Warps of an optimizer's kernel that holds a row of BLOCK_D columns, its gradient and its moments."""
    warps = max(1, BLOCK_D // (256 if BLOCK_D <= 1024 else 512))
    return max(1, warps // 2) if family == "gfx942" else warps  # of 64 threads there


@dataclass(frozen=True)
class LatentStepConfig:
    """Tiles of the latent-major backward with the optimizer behind it."""

    LATENTS: int
    """Latents per program: one partial row of W_encᵀ d_bias is written for all of them."""

    BLOCK_P: int
    """Pairs per iteration."""

    BLOCK_D: int
    """At least D: the whole row in registers."""

    num_warps: int

    STAGES: int = 0
    """See :class:`LatentGradConfig`."""

    max_registers: int | None = None
    """Of a thread, where the compiler would take more and leave room for fewer programs at a time."""

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        return {"num_warps": self.num_warps} | ({"maxnreg": self.max_registers} if self.max_registers else {})


def latent_step_config(D: int, family: str) -> LatentStepConfig:
    """Few registers a thread, so that two rows or more share a multiprocessor; pairs of wide rows come one by one."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    warps = max(1, BLOCK_D // (1024 if family == "gfx942" else 512))
    stages = 0 if gpu.interpreting() or BLOCK_D > 2048 else 2  # wider rows leave no registers for it
    registers = {1024: 96, 2048: 128}.get(BLOCK_D) if family == "sm_90" else None  # 7 % faster on an H200
    if BLOCK_D <= 1024:
        return LatentStepConfig(4, 1024 // BLOCK_D, BLOCK_D, warps, stages, registers)
    return LatentStepConfig(16, 2 if BLOCK_D == 2048 else 1, BLOCK_D, warps, stages, registers)
