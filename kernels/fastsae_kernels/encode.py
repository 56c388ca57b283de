"""``TopK(ReLU(x weightᵀ + bias))`` without [N, L] in memory, and the same through the vendor's matrix product.

Shapes: N tokens, D width, L latents, K active latents.

Fused. `fused_product.py` keeps two words per group of latents; `resolve.py` picks the exact top K from these and
re-scores what a group may hide.

Chunked. The vendor's product of a block of rows into reused scratch (float32 scores where the vendor can write
them, so that ranking loses nothing to a 16-bit rounding), then `select.select_scores`, which adds the bias.

Neither's memory grows with N: both work in blocks of rows with at most ``configs.CHUNK_BYTES`` of scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, gpu, tuning
from .encoder_choice import choose_encoder
from .fused_product import group_maxima
from .groupmax import groupmax_encode
from .resolve import resolve
from .select import select_scores


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
