# pyright: basic
"""``TopK(ReLU(x weightᵀ + bias))`` without [N, L] in memory, and the same through the vendor's matrix product.

Shapes: N tokens, D width, L latents, K active latents; groups of GROUP latents each (`select.group_column`).

Fused. `_encode_kernel` computes a tile of scores, packs each into a key whose low bits are replaced by the member's
number inside its strided group, and keeps per (token, group) the two largest packed keys, as two words: the full
bits of the group's maximum, and ``(second packed key with its low bits cut) ‖ (member of the first)``. The stride is
the one at which a thread of the matrix unit owns all members, so that the reduction crosses no lanes.
`resolve.py` picks the exact top K from these words and re-scores what a group may hide.

Chunked. The vendor's product of a block of rows into reused scratch (float32 scores where the vendor can write
them, so that ranking loses nothing to a 16-bit rounding), then `select.select_scores`, which adds the bias.

Neither's memory grows with N: both work in blocks of rows with at most ``configs.CHUNK_BYTES`` of scratch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, gpu, tuning
from .encoder_choice import choose_encoder
from .gemm_tile import tile_operands, tile_scores
from .groupmax import groupmax_encode
from .keys import relu_key
from .resolve import resolve
from .select import select_scores


@triton.jit(do_not_specialize=["N"])
def _encode_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr,
    N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SWIZZLE_N: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_L: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program per tile; PERSISTENT: one per multiprocessor, which loads a tile while it reduces the last one."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(L, BLOCK_L)
    if PERSISTENT and INTERPRETED:  # see gemm_tile.py
        tile = tl.program_id(0)
        while tile < tiles:
            _encode_tile(
                tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D, GROUP,
                STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
            tile += tl.num_programs(0)
    elif PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _encode_tile(
                tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D, GROUP,
                STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        _encode_tile(
            tl.program_id(0), x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D,
            GROUP, STRIDE, SWIZZLE_N, EVEN_D, EVEN_L, HAS_MASK, DESCRIPTORS, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _encode_tile(
    tile, x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SWIZZLE_N: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_L: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The two words of a tile's groups; blocks of SWIZZLE_N token blocks sweep the latents together."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_l = tl.cdiv(L, BLOCK_L)
    first_n = tile // (SWIZZLE_N * blocks_l) * SWIZZLE_N
    swizzle = tl.minimum(blocks_n - first_n, SWIZZLE_N)
    pid_n = first_n + tile % (SWIZZLE_N * blocks_l) % swizzle
    pid_l = tile % (SWIZZLE_N * blocks_l) // swizzle
    scores = tile_scores(
        x_ptr, weight_ptr, bias_ptr, pid_n * BLOCK_N, pid_l * BLOCK_L, N, D, L,
        BLOCK_N, BLOCK_L, BLOCK_D, EVEN_D, DESCRIPTORS, PRECISION, INTERPRETED,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_l = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    keys = relu_key(scores)
    if HAS_MASK:
        kept = tl.load(mask_ptr + offs_l, mask=offs_l < L, other=0) != 0
        keys = tl.where(kept[None, :], keys, 0)
    if not EVEN_L:
        keys = tl.where((offs_l < L)[None, :], keys, 0)
    keys = tl.reshape(keys, (BLOCK_N, BLOCK_L // (STRIDE * GROUP), GROUP, STRIDE))
    first, second = _two_largest(keys, GROUP)
    offs_g = pid_l * (BLOCK_L // GROUP) + tl.arange(0, BLOCK_L // GROUP)
    num_groups = blocks_l * (BLOCK_L // GROUP)
    offs = offs_n.to(tl.int64)[:, None] * (2 * num_groups) + offs_g[None, :]
    inside = (offs_n < N)[:, None]
    tl.store(maxima_ptr + offs, tl.reshape(first, (BLOCK_N, BLOCK_L // GROUP)), mask=inside)
    tl.store(maxima_ptr + offs + num_groups, tl.reshape(second, (BLOCK_N, BLOCK_L // GROUP)), mask=inside)


@triton.jit
def _two_largest(keys, GROUP: tl.constexpr):
    """The two words of each group of ``keys`` [.., .., GROUP, ..]: see the top of this file."""
    member = tl.arange(0, GROUP)[None, None, :, None]
    packed = (keys & -GROUP) | (GROUP - 1 - member)  # of equal cut keys the smaller member is larger
    top = tl.max(packed, axis=2)
    runner_up = tl.max(tl.where(packed == tl.expand_dims(top, 2), 0, packed), axis=2)
    return tl.max(keys, axis=2), (runner_up & -GROUP) | (GROUP - 1 - (top & (GROUP - 1)))


def encode(
    x: Tensor,  # [N, D], b_dec already subtracted
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    k: int,
    activation: str = "topk",
    latent_mask: Tensor | None = None,  # bool [L]
    *,
    path: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Activations float32 [N, K] and indices int64 [N, K]; the order is :func:`.reference.select`'s.

    The product is computed in ``x.dtype`` (the weight is rounded to it), accumulated in float32. ``path`` is
    ``"fused"``, ``"chunked"`` or ``"auto"``, see :func:`.encoder_choice.choose_encoder`. Raises ``ValueError`` for
    float64 and where ``path`` cannot do the shape.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"encode: the Triton kernels compute in float32, float16 or bfloat16, got {x.dtype}; "
            'use implementation="reference" for float64'
        )
    x, weight, bias = _whole_rows(x), _whole_rows(weight.to(x.dtype)), bias.float().contiguous()
    latent_mask = None if latent_mask is None else latent_mask.contiguous()
    acts = torch.empty((x.shape[0], k), dtype=torch.float32, device=x.device)
    indices = torch.empty_like(acts, dtype=torch.int64)
    path = choose_encoder(x.shape[1], weight.shape[0], k, x.dtype, x.device, path, activation)
    if x.shape[0] == 0:
        return acts, indices
    if path == "chunked":
        _encode_chunked(x, weight, bias, latent_mask, k, activation, acts, indices)
    elif activation == "groupmax":
        groupmax_encode(x, weight, bias, latent_mask, k, acts, indices)
    else:
        _encode_fused(x, weight, bias, latent_mask, k, acts, indices, _fused_config(x, weight, bias, k))
    return acts, indices


def _whole_rows(matrix: Tensor) -> Tensor:
    """``matrix`` [.., D] with rows of whole 16-byte words: where they are not, zeros are added to a copy."""
    D = matrix.shape[1]
    if D * matrix.element_size() % 16:
        matrix = torch.nn.functional.pad(matrix, (0, -D % 16))
    return matrix.contiguous()


def _fused_config(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> configs.EncodeConfig:
    """Shipped tiles, or the fastest of a few where the user asked for timing; on at most 4096 tokens."""
    L, D = weight.shape
    family = gpu.gpu_family(x.device)
    if not tuning.enabled() or not x.is_cuda:
        return configs.default_encode(D, L, x.dtype, family)
    tokens = x[:4096]
    acts = torch.empty((tokens.shape[0], k), dtype=torch.float32, device=x.device)
    indices = torch.empty_like(acts, dtype=torch.int64)
    return tuning.tuned(
        "encode", {"D": D, "L": L, "k": k}, x.dtype, torch.cuda.get_device_name(x.device),
        configs.encode_candidates(D, L, x.dtype, family),
        lambda config: _encode_fused(tokens, weight, bias, None, k, acts, indices, config),
    )  # fmt: skip


def _encode_fused(x, weight, bias, latent_mask, k, acts, indices, config) -> None:
    N, num_groups = x.shape[0], config.num_groups(weight.shape[0])
    rows = chunk_rows(N, 2 * 4 * num_groups, config.BLOCK_N * config.SWIZZLE_N)
    maxima = torch.empty((rows, 2, num_groups), dtype=torch.int32, device=x.device)
    for begin in range(0, N, rows):
        block = slice(begin, min(begin + rows, N))
        group_maxima(x[block], weight, bias, latent_mask, maxima, config)
        resolve(x[block], weight, bias, latent_mask, maxima, k, config, acts[block], indices[block])


def chunk_rows(N: int, bytes_per_row: int, multiple: int) -> int:
    """Rows per block so that scratch stays within ``configs.CHUNK_BYTES``, a multiple of ``multiple``, or all N."""
    return min(N, max(1, configs.CHUNK_BYTES // (bytes_per_row * multiple)) * multiple)


def group_maxima(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D], dtype of x
    bias: Tensor,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    maxima: Tensor,  # [>= N, 2, P] int32, written
    config: configs.EncodeConfig,
) -> None:
    """The two words of every (token, group): the fused product alone."""
    N, D = x.shape
    L = weight.shape[0]
    operands = tile_operands(x, weight, config.BLOCK_N, config.BLOCK_L, config.BLOCK_D) if config.descriptors else None
    x_operand, weight_operand = operands or (x, weight)
    programs = triton.cdiv(N, config.BLOCK_N) * triton.cdiv(L, config.BLOCK_L)
    constexprs = maxima_constexprs(
        D, L, x.dtype, config, has_mask=latent_mask is not None, descriptors=operands is not None
    )
    if constexprs["PERSISTENT"]:
        programs = min(programs, gpu.multiprocessors(x.device))
    _encode_kernel[(programs,)](
        x_operand, weight_operand, bias, latent_mask, maxima,
        N, D, L,
        **constexprs, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def maxima_constexprs(
    D: int, L: int, dtype: torch.dtype, config: configs.EncodeConfig, *, has_mask: bool, descriptors: bool
) -> dict:
    """What `_encode_kernel` is compiled for."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_L": config.BLOCK_L,
        "BLOCK_D": config.BLOCK_D,
        "GROUP": config.GROUP,
        "STRIDE": config.STRIDE,
        "SWIZZLE_N": config.SWIZZLE_N,
        "EVEN_D": D % config.BLOCK_D == 0,
        "EVEN_L": L % config.BLOCK_L == 0,
        "HAS_MASK": has_mask,
        "DESCRIPTORS": descriptors,
        "PERSISTENT": config.persistent and descriptors == config.descriptors,
        "PRECISION": gpu.dot_precision(dtype),
        "INTERPRETED": gpu.interpreting(),
    }


def _encode_chunked(x, weight, bias, latent_mask, k, activation, acts, indices) -> None:
    N, L = x.shape[0], weight.shape[0]
    rows = chunk_rows(N, 4 * L, 16)
    dtype = x.dtype if torch.version.hip else torch.float32  # ROCm's product cannot widen its output
    scores = torch.empty((rows, L), dtype=dtype, device=x.device)
    for begin in range(0, N, rows):
        block = slice(begin, min(begin + rows, N))
        chunk = scores[: block.stop - begin]
        if not x.is_cuda:  # under the interpreter
            torch.mm(x[block].float(), weight.float().T, out=chunk)
        elif dtype == x.dtype:
            torch.mm(x[block], weight.T, out=chunk)
        else:
            torch.mm(x[block], weight.T, out_dtype=dtype, out=chunk)
        select_scores(chunk, bias, latent_mask, k, activation, acts[block], indices[block])
