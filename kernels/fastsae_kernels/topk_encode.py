# pyright: basic
"""``TopK(ReLU(x weightᵀ + bias))`` without [N, L] in memory, and the same through the vendor's matrix product.

Shapes: N tokens, D width, L latents, K active latents; P groups of GROUP latents each.

Fused. `_encode_kernel` computes a tile of scores, packs each into a key whose low bits are replaced by the member's
number inside its strided group, and keeps per (token, group) the two largest packed keys. Written are two words:
the full bits of the group's maximum, and ``(second packed key with its low bits cut) ‖ (member of the first)``.
`_resolve_kernel`, one program per token, then picks the top K by the lemma in `select.py`.

Why it is exact. Let a row's group hold keys k1 >= k2 >= ... and let T cut the low bits, which keeps order. The
words hold k1 in full and T(q2) for the second packed key q2, where T(q2) = T(k2). So ``bound = min(k1, T(k2) | low
bits) >= k2`` bounds every other member, which is all that `select.py` asks. If T(k1) > T(k2), the first packed key
is the true maximum's and its member is right; if T(k1) = T(k2), cut keys tie and the stored member may be another
one's, but then bound = k1, so that a group whose maximum can matter (k1 >= t) is hidden and its members are looked at
one by one. Cutting therefore never decides anything. (Keys below GROUP, activations under 2^-144, count as 0: their
cut key is 0.)

Values and the order of summation. In a row without hidden groups the activations are the tile's float32
accumulators, bit for bit: the result is what a float32 sort of them gives. In a row with hidden groups every
candidate's score is computed anew in one order (`_dot_rows`: partial sums over BLOCK_D interleaved columns, then a
tree), and selection and values follow these, so that equal rows of ``weight`` always tie. The two orders differ by
float32 rounding of the sum, never by a rounding of the key.

Chunked. The vendor's product of a block of rows into reused scratch (float32 scores where the vendor can write
them, so that ranking loses nothing to a 16-bit rounding), then `select.select_scores`, which adds the bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .gemm_tile import tile_scores
from .groupmax import groupmax_encode
from .keys import pack_rank, relu_key
from .select import find_candidates, group_column, keep_best, kth_best, select_scores, window_columns, write_row

_BIG = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["N"])
def _encode_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr,
    N, D, L,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SWIZZLE_N: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_L: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile; blocks of SWIZZLE_N token blocks sweep the latents together."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_l = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    first_n = pid // (SWIZZLE_N * blocks_l) * SWIZZLE_N
    swizzle = tl.minimum(blocks_n - first_n, SWIZZLE_N)
    pid_n = first_n + pid % (SWIZZLE_N * blocks_l) % swizzle
    pid_l = pid % (SWIZZLE_N * blocks_l) // swizzle
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_l = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    scores = tile_scores(
        x_ptr, weight_ptr, bias_ptr, offs_n, offs_l, N, D, L, BLOCK_N, BLOCK_L, BLOCK_D, EVEN_D, PRECISION, UPCAST
    )
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


@triton.jit
def _dot_rows(x_ptr, weight_ptr, columns, exists, D, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products of one token with the rows ``columns`` of the weight, float32 [WINDOW]."""
    acc = tl.zeros((WINDOW, BLOCK_D), dtype=tl.float32)
    rows = columns.to(tl.int64)[:, None] * D
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        mask = exists[:, None] & (offs_d < D)[None, :]
        weight = tl.load(weight_ptr + rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += weight * x[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _resolve_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, maxima_ptr, list_ptr, acts_ptr, indices_ptr,
    D, L, num_groups,
    K: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program per token: the top K of a row of group maxima, re-scoring where a group hides members."""
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr += row * (2 * num_groups)
    groups = tl.arange(0, P)
    first = tl.load(maxima_ptr + groups, mask=groups < num_groups, other=0)
    second = tl.load(maxima_ptr + num_groups + groups, mask=groups < num_groups, other=0)
    bound = tl.minimum(first, second | (GROUP - 1))
    columns = group_column(groups, second & (GROUP - 1), STRIDE, GROUP)
    single, single_place, hidden, hidden_place = find_candidates(first, bound, GROUP, K, WINDOW)
    num_singles = tl.sum(single.to(tl.int32), axis=0)
    total = num_singles + tl.sum(hidden.to(tl.int32), axis=0) * GROUP
    largest_bound = tl.max(bound, axis=0)
    best = tl.zeros((WINDOW,), tl.int64)
    begin = tl.full((), 0, tl.int32)
    while begin < total:
        cols, exists = window_columns(
            begin, single, single_place, hidden, hidden_place, columns, groups,
            list_ptr + row * (2 * WINDOW), L, STRIDE, GROUP, WINDOW,
        )  # fmt: skip
        if total > num_singles:
            scores = _dot_rows(x_ptr + row * D, weight_ptr, cols, exists, D, WINDOW, BLOCK_D)
            keys = relu_key(scores + tl.load(bias_ptr + cols, mask=exists, other=0.0))
            if HAS_MASK:
                keys = tl.where(tl.load(mask_ptr + cols, mask=exists, other=0) != 0, keys, 0)
        else:
            group = cols // (STRIDE * GROUP) * STRIDE + cols % STRIDE
            keys = tl.load(maxima_ptr + group, mask=exists, other=0)
        best = keep_best(best, tl.where(exists & (keys >= GROUP), pack_rank(keys, cols), 0), begin, K, WINDOW)
        begin += WINDOW
        if begin >= num_singles:  # hidden groups come by ascending column: a flood of ties or NaN ends here
            left = hidden & ((hidden_place + 1) * GROUP > begin - num_singles)
            next_column = tl.min(tl.where(left, groups // STRIDE * (STRIDE * GROUP), _BIG), axis=0)
            if kth_best(best, K, WINDOW) > pack_rank(largest_bound, next_column):
                begin = total
    write_row(best, acts_ptr + row * K, indices_ptr + row * K, K, WINDOW)


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
    ``"fused"``, ``"chunked"`` or ``"auto"``, see :func:`.configs.choose_encoder`. Raises ``ValueError`` for float64
    and where ``path`` cannot do the shape.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"encode: the Triton kernels compute in float32, float16 or bfloat16, got {x.dtype}; "
            'use implementation="reference" for float64'
        )
    x, weight, bias = x.contiguous(), weight.to(x.dtype).contiguous(), bias.float().contiguous()
    latent_mask = None if latent_mask is None else latent_mask.contiguous()
    acts = torch.empty((x.shape[0], k), dtype=torch.float32, device=x.device)
    indices = torch.empty_like(acts, dtype=torch.int64)
    path = configs.choose_encoder(x.shape[1], weight.shape[0], k, x.dtype, x.device, path, activation)
    if path == "chunked":
        _encode_chunked(x, weight, bias, latent_mask, k, activation, acts, indices)
    elif activation == "groupmax":
        groupmax_encode(x, weight, bias, latent_mask, k, acts, indices)
    else:
        _encode_fused(x, weight, bias, latent_mask, k, acts, indices)
    return acts, indices


def _encode_fused(x, weight, bias, latent_mask, k, acts, indices) -> None:
    N, D = x.shape
    L = weight.shape[0]
    config = configs.encode_config(D, L, k, x.dtype, x.device)
    num_groups = triton.cdiv(L, config.BLOCK_L) * (config.BLOCK_L // config.GROUP)
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
    _encode_kernel[(triton.cdiv(N, config.BLOCK_N) * triton.cdiv(L, config.BLOCK_L),)](
        x, weight, bias, latent_mask, maxima,
        N, D, L,
        BLOCK_N=config.BLOCK_N, BLOCK_L=config.BLOCK_L, BLOCK_D=config.BLOCK_D,
        GROUP=config.GROUP, STRIDE=config.STRIDE, SWIZZLE_N=config.SWIZZLE_N,
        EVEN_D=D % config.BLOCK_D == 0, EVEN_L=L % config.BLOCK_L == 0, HAS_MASK=latent_mask is not None,
        PRECISION=configs.dot_precision(x.dtype), UPCAST=configs.interpreting(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def resolve(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D], dtype of x
    bias: Tensor,  # [L] float32
    latent_mask: Tensor | None,  # bool [L]
    maxima: Tensor,  # [>= N, 2, P] int32
    k: int,
    config: configs.EncodeConfig,
    acts: Tensor,  # [N, K] float32, written
    indices: Tensor,  # [N, K] int64, written
) -> None:
    """The top k of every token from :func:`group_maxima`'s words."""
    N, D = x.shape
    num_groups = maxima.shape[2]
    rows = configs.resolve_config(num_groups, k, config.GROUP, configs.gpu_family(x.device))
    compacted = torch.empty((N, 2, rows.WINDOW), dtype=torch.int32, device=x.device)
    _resolve_kernel[(N,)](
        x, weight, bias, latent_mask, maxima, compacted, acts, indices,
        D, weight.shape[0], num_groups,
        K=k, P=triton.next_power_of_2(num_groups), WINDOW=rows.WINDOW, BLOCK_D=rows.BLOCK_D,
        GROUP=config.GROUP, STRIDE=config.STRIDE, HAS_MASK=latent_mask is not None,
        num_warps=rows.num_warps,
    )  # fmt: skip


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
