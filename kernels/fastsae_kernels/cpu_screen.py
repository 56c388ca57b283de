"""Exact TopK encoding whose matrix product runs in bfloat16 and only screens.

Shapes: N tokens, D width, L latents, K active latents; n rows of a chunk, C candidates.

A bfloat16 product ranks all latents, the best ones per token are scored again in float32, and the k best of these
are returned, provided that no excluded latent can beat them. How many are scored again is up to the scores: those
that lie within twice the bound below the k-th, in at most C = 2k groups, or more for the tokens that need them.

Bound. Write x̂, ŵ, b̂ for the operands rounded to bfloat16, δ for the rounding errors (known exactly: they
are computed, not bounded), u = 2⁻⁸ for bfloat16's unit roundoff and t for the largest screening score that was
not scored again. A float32 sum of D + 1 terms, in any order, is off by at most (D + 8)·2⁻²⁴·(‖x‖‖w‖ + |b|).
By Cauchy-Schwarz

    |x̂·ŵ − x·w| = |δx·w + x̂·δw| <= ‖δx‖‖w‖ + (‖x‖ + ‖δx‖)‖δw‖ .

An excluded latent's stored screening score is <= t. At most two roundings to bfloat16 made it, that of the
product p and that of p + b̂, so it stood for at most t + u|t| + u(|t|(1 + u) + |b̂|). Its float32 score,
whatever the order of summation, is therefore at most

    U = t + u(2.02|t| + max|b̂|) + max|δb| + max_l(‖δx‖‖w_l‖ + (‖x‖ + ‖δx‖)‖δw_l‖) + (D + 8)·2⁻²²·(‖x‖‖w‖ + max|b|) ,

where the last term pays for both float32 sums twice over, and the maximum is taken factor by factor. Norms are
raised by D·2⁻²³ (their own rounding) and √D·2⁻⁶³ (squares that underflow, subnormal inputs flushed to
zero). A token is certified if its k-th activation exceeds U; where that activation is 0, U < 0 says that every
excluded one is 0 too. All other tokens, and those whose bound is not finite, are encoded in float32 in full.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_sampled import ragged_products
from .cpu_select import GROUP, ordered

SCREENS = (2, 4, 16)  # candidates per active latent: at first, then for tokens that these do not certify
UNIT_ROUNDOFF = 2.0**-8
LATENTS = 1024  # latents rounded at a time: the float32 differences stay in cache
LARGEST = 1e38  # no partial sum below it can overflow


class ScreenStats(NamedTuple):
    """What screening did in this process."""

    rows: int
    """Tokens that were screened."""

    fallbacks: int
    """Of these, tokens that were not certified and were encoded in float32 instead."""


_stats = [0, 0]
_memory = threading.local()


def screen_stats() -> ScreenStats:
    """Counts since the process began; two calls bracket what lies between them."""
    return ScreenStats(*_stats)


def pays(x: Tensor, weight: Tensor, k: int) -> bool:
    """Whether screening is expected to beat the float32 product here.

    The product must be large against the selection, and bfloat16 products must be faster than float32 ones:
    so with AMX and on AMD's AVX512-BF16, not on Intel's, whose vdpbf16ps has no more throughput than FMA.
    """
    return len(x) >= 64 and x.shape[1] >= 256 and 64 * k <= len(weight) and _fast_bf16()


def _fast_bf16() -> bool:
    cpu = torch.cpu
    if hasattr(cpu, "_is_amx_tile_supported") and cpu._is_amx_tile_supported():
        return True
    native = hasattr(cpu, "_is_avx512_bf16_supported") and cpu._is_avx512_bf16_supported()
    return native and hasattr(cpu, "get_capabilities") and "AMD" in cpu.get_capabilities().get("cpu_name", "")


class Rounded(NamedTuple):
    """A float32 coder in bfloat16, and how far off it can be."""

    weight: Tensor  # [L, D] bfloat16
    bias: Tensor  # [L] bfloat16
    norm: Tensor  # max ‖w_l‖, float64 like all below
    error: Tensor  # max ‖δw_l‖
    bias_size: Tensor  # max |b|, |b̂|
    bias_error: Tensor  # max |δb|


def round_coder(weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Rounded:
    """Round ``weight`` [L, D] (into ``out``) and ``bias`` [L] to bfloat16, measuring the errors made."""
    rounded = torch.empty_like(weight, dtype=torch.bfloat16) if out is None else out
    norms, errors = [], []
    for part, out in zip(weight.split(LATENTS), rounded.split(LATENTS), strict=True):
        out.copy_(part)
        norms.append(norm(part).amax())
        errors.append(norm(part - out).amax())  # the difference of the two is exact
    low = bias.to(torch.bfloat16)
    size = torch.maximum(bias.abs(), low.abs()).masked_fill(bias.isinf(), 0.0)
    error = (bias - low).masked_fill(bias == low, 0.0)  # ±inf are exact
    return Rounded(
        rounded, low, torch.stack(norms).amax(), torch.stack(errors).amax(),
        size.double().amax(), error.abs().double().amax(),
    )  # fmt: skip


def norm(rows: Tensor) -> Tensor:
    """An upper bound of each row's Euclidean norm, float64 [n]."""
    D = rows.shape[1]
    return torch.linalg.vector_norm(rows, dim=1).double() * (1 + D * 2.0**-23) + D**0.5 * 2.0**-63


def excluded_bound(
    weakest: Tensor, x: Tensor, x_low: Tensor, coder: Rounded, norms: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """U above: [n] float64, infinite or NaN where nothing can be promised. ``weakest`` is t, [n].

    ``norms``: of x and of x - x_low, where the caller has them.
    """
    t, (size, error) = weakest.double(), norms or (norm(x), norm(x - x_low))
    scale = size * coder.norm + coder.bias_size
    stored = UNIT_ROUNDOFF * (2.02 * t.abs() + coder.bias_size) + coder.bias_error
    rounding = error * coder.norm + (size + error) * coder.error
    summation = (x.shape[1] + 8) * 2.0**-22 * scale
    return (t + stored + rounding + summation).masked_fill(~(scale < LARGEST), torch.inf)


def screened_topk(
    x: Tensor,  # [N, D] float32
    weight: Tensor,  # [L, D] float32
    bias: Tensor,  # [L] float32
    k: int,
    chunk: int,  # tokens at a time
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [N, K], indices [N, K], and bool [N]: which tokens are certified. The others hold nothing."""
    N = len(x)
    coder = round_coder(weight, bias, _scratch("weight", *weight.shape))
    top_acts, top_indices = x.new_empty(N, k), torch.empty(N, k, dtype=torch.int64)
    certified = torch.zeros(N, dtype=torch.bool)
    scratch = _scratch("scores", min(chunk, N), weight.shape[0])
    for start in range(0, N, chunk):
        part = x[start : start + chunk]
        low = part.to(torch.bfloat16)
        scores = torch.addmm(coder.bias, low, coder.weight.t(), out=scratch[: len(part)])
        rest = torch.arange(len(part))
        for factor in SCREENS:
            count = min(factor * k, weight.shape[0] - 1)  # all of them would leave nothing to bound
            of_all = len(rest) == len(part)
            tokens = (scores, part, low) if of_all else (scores[rest], part[rest], low[rest])
            acts, indices, proven = _rank(*tokens, weight, bias, coder, k, count)
            top_acts[start + rest], top_indices[start + rest] = acts, indices
            certified[start + rest] = proven
            rest = rest[~proven]
            if not len(rest):
                break
        _stats[0] += len(part)
        _stats[1] += len(rest)
        if 2 * len(rest) > len(part):  # this coder's scores lie too close: do not try the others
            break
    return top_acts, top_indices, certified


def _scratch(use: str, rows: int, columns: int) -> Tensor:
    """Uninitialised bfloat16 [rows, columns]; a thread's calls share its memory, for fresh pages cost their zeroing."""
    numbers = rows * columns
    kept = getattr(_memory, use, None)
    if kept is None or len(kept) < numbers:
        kept = torch.empty(numbers, dtype=torch.bfloat16)
        setattr(_memory, use, kept)
    return kept[:numbers].view(rows, columns)


def _rank(
    scores: Tensor,  # [n, L] bfloat16
    x: Tensor,  # [n, D] float32
    low: Tensor,  # [n, D]: x in bfloat16
    weight: Tensor,
    bias: Tensor,
    coder: Rounded,
    k: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations and indices [n, K], and bool [n]: certified. At most ``count`` groups of a row are looked at."""
    n, num_latents = scores.shape
    width = num_latents // GROUP
    if 2 * count > width:  # groups would cover most of the row anyway: every entry is a group of its own
        tail = scores[:, :0]
        best, groups = scores.topk(count + 1, dim=1)
        members = best[:, None, :count]
    else:
        grouped, tail = scores[:, : width * GROUP].unflatten(1, (GROUP, width)), scores[:, width * GROUP :]
        best, groups = grouped.amax(1).topk(count + 1, dim=1)
        members = grouped.gather(2, groups[:, None, :count].expand(-1, GROUP, -1))  # [n, GROUP, count]
    # The k-th best maximum is at most the k-th best score, and hardly less. What lies further below it than twice the
    # bound is not scored again; nor are the groups behind the first `count`.
    kth, norms = best[:, k - 1].double(), (norm(x), norm(x - low))
    least = kth - 2 * (excluded_bound(kth, x, low, coder, norms) - kth)
    kept, kept_tail = members >= least[:, None, None], tail >= least[:, None]
    rows, member, group = kept.nonzero().unbind(1)
    columns, counts = groups[rows, group] + member * width, kept.sum((1, 2))
    if tail.shape[1]:
        rows_tail, columns_tail = kept_tail.nonzero().unbind(1)
        order = torch.cat([rows, rows_tail]).argsort(stable=True)
        columns = torch.cat([columns, columns_tail + width * GROUP])[order]
        counts = counts + kept_tail.sum(1)
    most = max(k, int(counts.amax()))
    filled = torch.arange(most) < counts[:, None]
    exact, where = torch.full((n, most), -torch.inf), torch.zeros((n, most), dtype=torch.int64)
    exact[filled] = ragged_products(x, weight, columns, counts).add_(bias[columns])
    where[filled] = columns
    top_acts, top_indices = ordered(exact.relu_(), where, k)
    weakest = torch.maximum(least, best[:, count].double())  # nothing that was not scored again is above it
    return top_acts, top_indices, top_acts[:, -1] > excluded_bound(weakest, x, low, coder, norms)
