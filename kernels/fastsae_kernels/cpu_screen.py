"""Exact TopK encoding whose matrix product runs in bfloat16 and only screens.

Shapes: N tokens, D width, L latents, K active latents; n rows of a chunk, C candidates.

A bfloat16 product ranks all latents. The k-th largest score, less what rounding makes of it, is about what the k-th
activation reaches. Whatever the bound in :mod:`.cpu_bound` lets reach it too is scored again in float32, and the k best
are returned, provided that no excluded latent can beat them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_bound import Rounded, excluded_bound, norm, round_coder
from .cpu_candidates import NONE, below, bits, candidates, few, numbers, ordered_bits, scored
from .cpu_linear import is_amd
from .cpu_select import GROUP, ordered

USUAL = 1 / 8
"""Of the bound on the rounding errors' sum, what they add up to: they hardly ever all point one way."""

LEAST = 2**30
"""N · L · min(D, 256) from which it pays on AMD: measured for D of 64 to 1024 and L of 2048 to 16384."""

LEAST_AMX = 2**17
"""N · D from which it pays on AMX, whose bfloat16 products are faster still."""


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

    The product must be large against the rounding of the weights and the selection, and bfloat16 products must be
    faster than float32 ones: so with AMX and on AMD's AVX512-BF16, not on Intel's, whose vdpbf16ps has no more
    throughput than FMA.
    """
    (N, D), L = x.shape, len(weight)
    if D < 64 or 64 * k > L:
        return False
    if _supports("_is_amx_tile_supported") and N * D >= LEAST_AMX:
        return True
    return N * L * min(D, 256) >= LEAST and is_amd() and _supports("_is_avx512_bf16_supported")


def _supports(what: str) -> bool:
    return getattr(torch.cpu, what, lambda: False)()  # not in every version of torch


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
        # At first for k scores well above 0, whose rounding is as usual; then for what that could not prove.
        for keys_of, lowest, share in ((bits, 0, USUAL), (ordered_bits, -(2**15), 1.0)):
            of_all = len(rest) == len(part)
            tokens = (scores, part, low) if of_all else (scores[rest], part[rest], low[rest])
            acts, indices, proven = _rank(keys_of(tokens[0]), *tokens[1:], weight, bias, coder, k, lowest, share)
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
    keys: Tensor,  # [n, L] int16: of the screening scores
    x: Tensor,  # [n, D] float32
    low: Tensor,  # [n, D]: x in bfloat16
    weight: Tensor,
    bias: Tensor,
    coder: Rounded,
    k: int,
    lowest: int,  # keys down to here are not in order
    share: float,  # of the bound, that rounding is expected to take from the k-th activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations and indices [n, K], and bool [n]: certified."""
    width = keys.shape[1] // GROUP
    if 2 * k > width:  # groups would cover most of the row: every entry is one of its own
        width = keys.shape[1]
    grouped = keys[:, : keys.shape[1] // width * width].unflatten(1, (-1, width))
    maxima = grouped.amax(1)  # [n, width]
    # The k-th largest maximum is at most the k-th largest score, and hardly less: k latents or some more reach it.
    # (Of every four groups the largest will do: what reaches it is scored anyway.)
    coarse = maxima[:, : width // 4 * 4].unflatten(1, (4, -1)).amax(1) if 8 * k <= width else maxima
    kth = coarse.topk(k, dim=1, sorted=False).values.amin(1)
    bound = partial(excluded_bound, x=x, x_low=low, coder=coder, norms=(norm(x), norm(x - low)))
    score = numbers(kth).double()
    reached = (score - share * (bound(score) - score)).clamp(min=0)  # by the k-th activation, it is expected
    least = below(_most_below(bound, reached))
    least_key = few(maxima, ordered_bits(least), k)
    least_key = least_key.masked_fill(~least.isfinite() | (torch.minimum(kth, least_key) <= lowest), NONE)
    acts, columns = scored(x, weight, bias, candidates(keys, grouped, maxima, least_key), k)
    top_acts, top_indices = ordered(acts, columns, k)
    # What was not scored again lies below `least`.
    proven = top_acts[:, -1] > bound(least)
    return top_acts, top_indices, proven & (least_key < NONE)


def _most_below(bound: Callable[[Tensor], Tensor], reached: Tensor) -> Tensor:
    """About the largest screening score t that is sure to stand for less than ``reached``: U(t) < reached; [n]."""
    first = 2 * reached - bound(reached)
    margin = torch.maximum(bound(reached) - reached, bound(first) - first)  # U(t) - t grows slowly with the size of t
    return reached - margin * (1 + 2.0**-6)
