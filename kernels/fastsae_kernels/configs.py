"""Default tile sizes by kernel, shape, dtype and GPU.

Shapes: N tokens, D width, L latents, K active latents. A default never depends on N, so that a new number of tokens
compiles nothing. ``FASTSAE_AUTOTUNE=1`` lets :mod:`.tuning` time a few candidates instead, once per shape and GPU.

GPU families are the targets that the test suite compiles for: ``sm_80`` (A100), ``sm_89`` (Ada, also Ampere and
Blackwell cards with 100 KB of shared memory), ``sm_90`` (Hopper), ``sm_100`` (datacenter Blackwell), ``gfx942``
(MI300), and ``interpreter``, whose tiles are tiny because it runs them one element loop at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

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


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


def gpu_family(device: torch.device) -> str:
    """Which family's defaults serve ``device``."""
    if interpreting() or device.type != "cuda":
        return "interpreter"
    return _family_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _family_of_gpu(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    if capability[0] == 10:
        return "sm_100"
    if capability[0] == 9:
        return "sm_90"
    return "sm_80" if capability == (8, 0) else "sm_89"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s precision: float32 products are never rounded to tf32; narrower ones have no choice."""
    return "ieee" if dtype == torch.float32 else "tf32"


def best(k: int) -> int:
    """Length of the sorted list that a select keeps per row."""
    return max(16, triton.next_power_of_2(k))


def window(k: int, extra: int) -> int:
    """Candidates that a select looks at together: k, and ``extra`` for the members of a hidden group, in bounds."""
    return min(256, max(16, triton.next_power_of_2(k + extra)))


def list_length(k: int, extra: int) -> int:
    """Scratch words of a row of a select."""
    return window(k, extra) + max(best(k), window(k, extra))


# ---- encoding ------------------------------------------------------------------------------------------------

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
    return default_select(L, k, gpu_family(device))


def default_select(L: int, k: int, family: str) -> SelectConfig:
    """Shipped lanes of the select from stored scores: 16 members a group, at least four groups a winner, in bounds.

    A hidden group costs another look at L / lanes stored scores, which is cheap; more lanes cost registers.
    """
    if family == "interpreter":
        return SelectConfig(max(16, triton.next_power_of_2(triton.cdiv(L, 4))), num_warps=1)
    lanes = min(2048, max(512, triton.next_power_of_2(triton.cdiv(L, 16))))
    lanes = max(lanes, min(4096, triton.next_power_of_2(4 * k)))
    return SelectConfig(lanes, num_warps=4 if k <= 256 else 8)


# ---- decoding and the backward pass ----------------------------------------------------------------------

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
        return LatentGradConfig(1024 // BLOCK_D, BLOCK_D, num_warps=1, STAGES=0 if interpreting() else 3)
    if itemsize == 2 and BLOCK_D in (2048, 4096) and not interpreting():
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
    stages = 0 if interpreting() or BLOCK_D > 2048 else 2  # wider rows leave no registers for it
    registers = {1024: 96, 2048: 128}.get(BLOCK_D) if family == "sm_90" else None  # 7 % faster on an H200
    if BLOCK_D <= 1024:
        return LatentStepConfig(4, 1024 // BLOCK_D, BLOCK_D, warps, stages, registers)
    return LatentStepConfig(16, 2 if BLOCK_D == 2048 else 1, BLOCK_D, warps, stages, registers)
