# pyright: basic
"""Jit helpers that turn activations into integers which sort the same way.

    key    int32  bits of ReLU(score): 0 for everything not positive, larger for larger, NaN above inf
    rank   int64  key ‖ ~column: larger activation first, equal activations by smaller column, in one integer;
                  0 is "nothing here" (a key of 0 never competes: see `select.write_row`)

Non-negative float32 numbers order like their bit patterns, so maxima, counts and sorts run on integers. All NaN
become one key: they tie, and the smaller column wins.
"""

import triton
import triton.language as tl

NAN_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def relu_key(scores):
    """Keys of float32 ``scores``."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(scores != scores, NAN_KEY, tl.maximum(bits, 0))


@triton.jit
def key_value(keys):
    """The float32 activations that ``keys`` stand for."""
    return keys.to(tl.float32, bitcast=True)


@triton.jit
def pack_rank(keys, columns):
    """Ranks of non-negative ``keys`` at ``columns``, both int32."""
    return (keys.to(tl.int64) << 32) | (columns ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def rank_key(ranks):
    """The keys inside ``ranks``."""
    return (ranks >> 32).to(tl.int32)


@triton.jit
def rank_column(ranks):
    """The columns inside ``ranks``."""
    return (ranks & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def kth_largest(keys, lo, hi, K: tl.constexpr):
    """The K-th largest of int32 ``keys`` [P], by bisection between bounds that hold it (or ``lo`` if fewer reach it).

    Needs ``0 <= lo``, ``max(keys) <= hi``. Stops early once exactly K keys reach the middle, and takes the least.
    """
    while lo < hi:
        mid = hi - (hi - lo) // 2
        count = tl.sum((keys >= mid).to(tl.int32), axis=0)
        hi = tl.where(count < K, mid - 1, tl.where(count == K, mid, hi))
        lo = tl.where(count < K, lo, mid)
    least = tl.min(tl.where(keys >= lo, keys, NAN_KEY), axis=0)
    return tl.where(tl.sum((keys >= lo).to(tl.int32), axis=0) < K, lo, least)
