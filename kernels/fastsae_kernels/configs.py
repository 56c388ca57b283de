"""Default tile sizes of the encoders and selects, by shape, dtype and GPU.

Shapes: N tokens, D width, L latents, K active latents. A default never depends on N, so that a new number of tokens
compiles nothing. ``FASTSAE_AUTOTUNE=1`` lets :mod:`.tuning` time a few candidates instead, once per shape and GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from . import gpu

CHUNK_BYTES = 256 * 2**20
"""Scratch memory of one encode call, at most (or one block of rows): it does not grow with N."""

MAX_FUSED_K = 512
"""Beyond this many active latents the fused encoder's select would need too wide a window."""

MAX_SELECT_K = 2048
"""Beyond this many, stored scores are sorted instead: counting pairs of candidates would cost more."""

MAX_GROUPS = 32768
"""The fused encoder's select holds one key per group in registers; more latents need the chunked encoder."""


@dataclass(frozen=True)
class EncodeConfig:
    """Tiles of the fused encoder."""

    BLOCK_N: int
    """Tokens of a tile."""

    BLOCK_L: int
    """Latents of a tile, a multiple of STRIDE * GROUP."""

    BLOCK_D: int
    """Step of the loop over the width."""

    GROUP: int
    """Members of a strided group."""

    STRIDE: int
    """Distance between a group's members: the one at which a thread of the matrix unit owns all of them."""

    num_warps: int
    num_stages: int

    descriptors: bool = False
    """Load tiles through tensor descriptors (TMA) where the addresses allow it."""

    SWIZZLE_N: int = 8
    """Blocks of tokens that share a sweep over the latents, so that a weight tile is reused from L2."""

    persistent: bool = False
    """One program per multiprocessor takes tile after tile, and loads the next while it reduces the last."""

    def num_groups(self, L: int) -> int:
        """Groups of a row, those of the last tile's padding included."""
        return triton.cdiv(L, self.BLOCK_L) * (self.BLOCK_L // self.GROUP)


@dataclass(frozen=True)
class SelectConfig:
    """One row of stored scores: LANES groups."""

    LANES: int
    num_warps: int


@dataclass(frozen=True)
class ResolveConfig:
    """One row of group maxima: WINDOW candidates at a time, re-scored BLOCK_D of the width at a time."""

    WINDOW: int
    BLOCK_D: int
    num_warps: int


def best(k: int) -> int:
    """Length of the sorted list that a select keeps per row."""
    return max(16, triton.next_power_of_2(k))


def window(k: int, extra: int) -> int:
    """Candidates that a select looks at together: k, and ``extra`` for the members of a hidden group, in bounds."""
    return min(256, max(16, triton.next_power_of_2(k + extra)))


def list_length(k: int, extra: int) -> int:
    """Scratch words of a row of a select."""
    return window(k, extra) + max(best(k), window(k, extra))


_ENCODE_16_BIT = {
    "sm_80": EncodeConfig(128, 256, 32, GROUP=8, STRIDE=32, num_warps=8, num_stages=3),
    "sm_89": EncodeConfig(128, 128, 32, GROUP=8, STRIDE=16, num_warps=4, num_stages=3),
    "sm_90": EncodeConfig(
        128, 256, 64, GROUP=16, STRIDE=8, num_warps=8, num_stages=3, descriptors=True, SWIZZLE_N=16, persistent=True
    ),
    "sm_100": EncodeConfig(128, 256, 64, GROUP=16, STRIDE=8, num_warps=8, num_stages=4, descriptors=True),
    "gfx942": EncodeConfig(128, 128, 64, GROUP=16, STRIDE=8, num_warps=8, num_stages=2),
    "interpreter": EncodeConfig(16, 16, 16, GROUP=4, STRIDE=4, num_warps=1, num_stages=1),
}
# Without matrix units a thread owns four neighbouring columns, which is a group.
_ENCODE_32_BIT = {
    "sm_80": EncodeConfig(64, 128, 16, GROUP=4, STRIDE=1, num_warps=8, num_stages=3),
    "sm_89": EncodeConfig(64, 128, 16, GROUP=4, STRIDE=1, num_warps=8, num_stages=3),
    "sm_90": EncodeConfig(64, 128, 16, GROUP=4, STRIDE=1, num_warps=8, num_stages=3),
    "sm_100": EncodeConfig(64, 128, 16, GROUP=4, STRIDE=1, num_warps=8, num_stages=3),
    "gfx942": EncodeConfig(64, 128, 32, GROUP=16, STRIDE=8, num_warps=8, num_stages=2),
    "interpreter": EncodeConfig(16, 16, 16, GROUP=4, STRIDE=4, num_warps=1, num_stages=1),
}


def default_encode(D: int, L: int, dtype: torch.dtype, family: str) -> EncodeConfig:
    """Shipped tiles of the fused encoder."""
    return (_ENCODE_32_BIT if dtype == torch.float32 else _ENCODE_16_BIT)[family]


def default_groupmax(dtype: torch.dtype, family: str) -> EncodeConfig:
    """Shipped tiles of the fused GroupMax: smaller, for its running maxima stay in registers beside them."""
    config = (_ENCODE_32_BIT if dtype == torch.float32 else _ENCODE_16_BIT)[family]
    return replace(
        config,
        BLOCK_L=min(config.BLOCK_L, 128),
        num_stages=min(config.num_stages, 3),
        descriptors=False,
        persistent=False,
    )


def encode_candidates(D: int, L: int, dtype: torch.dtype, family: str) -> list[EncodeConfig]:
    """What autotuning tries besides the default."""
    default = default_encode(D, L, dtype, family)
    found = [
        default,
        replace(default, SWIZZLE_N=24 - default.SWIZZLE_N),
        replace(default, num_stages=default.num_stages + 1),
    ]
    if default.num_stages > 2:
        found.append(replace(default, num_stages=default.num_stages - 1))
    if default.descriptors:
        found += [replace(default, persistent=not default.persistent)]
        found += [replace(default, persistent=False, descriptors=False)]
    return found


def resolve_config(num_groups: int, k: int, group: int, family: str) -> ResolveConfig:
    """How the fused encoder's select walks a row of ``num_groups`` maxima."""
    width = window(k, group)
    if family == "interpreter":
        return ResolveConfig(width, 16, num_warps=1)
    if family == "sm_90" and width <= 128 and num_groups <= 8192:
        return ResolveConfig(width, 32 if num_groups <= 4096 else 16, num_warps=4)  # 64 maxima a thread, at most
    num_warps = 16 if num_groups > 8192 else 4 if num_groups <= 2048 and width <= 128 else 8
    block_d = min(128, max(16, 512 * num_warps // width))  # 16 sums a thread, whatever the window
    return ResolveConfig(width, block_d, num_warps)


def select_config(L: int, k: int, device: torch.device) -> SelectConfig:
    """How stored scores are dealt into groups on ``device``."""
    return default_select(L, k, gpu.gpu_family(device))


def default_select(L: int, k: int, family: str) -> SelectConfig:
    """Shipped lanes of the select from stored scores: 16 members a group, at least four groups a winner, in bounds.

    A hidden group costs another look at L / lanes stored scores, which is cheap; more lanes cost registers.
    """
    if family == "interpreter":
        return SelectConfig(max(16, triton.next_power_of_2(triton.cdiv(L, 4))), num_warps=1)
    lanes = min(2048, max(512, triton.next_power_of_2(triton.cdiv(L, 16))))
    lanes = max(lanes, min(4096, triton.next_power_of_2(4 * k)))
    return SelectConfig(lanes, num_warps=4 if k <= 256 else 8)
