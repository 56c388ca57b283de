"""Keys and ranks: integers that sort like activations, and the k-th largest by bisection."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux")
import triton.language as tl  # noqa: E402
from fastsae_kernels.keys import key_value, kth_largest, pack_rank, rank_column, rank_key, relu_key  # noqa: E402

TINY = 2.0**-149  # the smallest positive float32
SCORES = [-math.inf, -1.0, -TINY, -0.0, 0.0, TINY, 2.0**-126, 0.5, 1.0, 1.0 + 2**-23, 3e38, math.inf]  # ascending
NAN_KEY = 0x7FFFFFFF


@triton.jit
def _keys_kernel(scores_ptr, keys_ptr, values_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    keys = relu_key(tl.load(scores_ptr + offs, mask=offs < n, other=0.0))
    tl.store(keys_ptr + offs, keys, mask=offs < n)
    tl.store(values_ptr + offs, key_value(keys), mask=offs < n)


@triton.jit
def _ranks_kernel(keys_ptr, columns_ptr, ranks_ptr, keys_out_ptr, columns_out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + offs, mask=offs < n, other=0)
    ranks = pack_rank(keys, tl.load(columns_ptr + offs, mask=offs < n, other=0))
    tl.store(ranks_ptr + offs, ranks, mask=offs < n)
    tl.store(keys_out_ptr + offs, rank_key(ranks), mask=offs < n)
    tl.store(columns_out_ptr + offs, rank_column(ranks), mask=offs < n)


@triton.jit
def _kth_kernel(keys_ptr, bounds_ptr, kth_ptr, K: tl.constexpr, P: tl.constexpr):
    lo = tl.load(bounds_ptr)
    hi = tl.load(bounds_ptr + 1)
    tl.store(kth_ptr, kth_largest(tl.load(keys_ptr + tl.arange(0, P)), lo, hi, K))


def keys_of(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.empty_like(scores, dtype=torch.int32), torch.empty_like(scores)
    _keys_kernel[(1,)](scores, keys, values, len(scores), BLOCK=triton.next_power_of_2(len(scores)))
    return keys.cpu(), values.cpu()


def ranks_of(keys: list[int], columns: list[int], device: str) -> torch.Tensor:
    keys_in, columns_in = (torch.tensor(t, dtype=torch.int32, device=device) for t in (keys, columns))
    ranks = torch.empty(len(keys), dtype=torch.int64, device=device)
    keys_out, columns_out = torch.empty_like(keys_in), torch.empty_like(columns_in)
    _ranks_kernel[(1,)](
        keys_in, columns_in, ranks, keys_out, columns_out, len(keys), BLOCK=triton.next_power_of_2(len(keys))
    )
    assert keys_out.tolist() == keys
    assert columns_out.tolist() == columns
    return ranks.cpu()


def kth(keys: list[int], k: int, lo: int, hi: int, device: str) -> int:
    found = torch.full((1,), -7, dtype=torch.int32, device=device)
    bounds = torch.tensor([lo, hi], dtype=torch.int32, device=device)
    _kth_kernel[(1,)](torch.tensor(keys, dtype=torch.int32, device=device), bounds, found, K=k, P=len(keys))
    return int(found)


def test_keys_by_value(device):
    keys, values = keys_of(torch.tensor(SCORES, device=device))
    assert keys.tolist() == [0, 0, 0, 0, 0, 1, 0x00800000, 0x3F000000, 0x3F800000, 0x3F800001, 0x7F61B1E6, 0x7F800000]
    assert torch.equal(values, torch.tensor(SCORES).relu())


def test_every_nan_is_one_key_above_infinity(device):
    patterns = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF]  # quiet, signalling, of both signs
    scores = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert scores.isnan().all()
    keys, values = keys_of(scores.to(device))
    assert keys.tolist() == [NAN_KEY] * 6
    assert values.isnan().all()


def test_keys_sort_like_activations(device):
    bits = torch.randint(-(2**31), 2**31, (507,), generator=torch.Generator().manual_seed(0)).int()
    scores = bits.view(torch.float32)[~bits.view(torch.float32).isnan()]
    keys, values = keys_of(scores.to(device))
    assert torch.equal(values, scores.relu())
    assert torch.equal(keys[:, None] > keys[None, :], scores.relu()[:, None] > scores.relu()[None, :])
    assert (keys >= 0).all()


def test_ranks_prefer_the_larger_key_then_the_smaller_column(device):
    pairs = [(key, column) for key in (1, 2, 0x3F800000, 0x7F800000, NAN_KEY) for column in (0, 1, 123, 2**31 - 1)]
    ranks = ranks_of([key for key, _ in pairs], [column for _, column in pairs], device)
    wanted = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], pairs[i][1]))
    assert ranks.argsort(descending=True).tolist() == wanted
    assert ranks.unique().numel() == len(pairs)
    assert (ranks > 0).all()  # 0 is "nothing here"


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("keys", [
    [5, 3, 8, 1, 9, 2, 7, 4],
    [4, 4, 4, 4, 4, 4, 4, 4],
    [9, 9, 9, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 6],
    [NAN_KEY, NAN_KEY, 0x7F800000, 1, 1, 1, 1, 0],
    [0] * 8,
])  # fmt: skip
def test_kth_largest_with_the_widest_and_the_tightest_bounds(keys, k, device):
    wanted = sorted(keys, reverse=True)[k - 1]
    for lo, hi in ((0, NAN_KEY), (wanted, max(keys)), (0, max(keys)), (max(0, wanted - 1), max(keys))):
        assert kth(keys, k, lo, hi, device) == wanted, (lo, hi)


def test_kth_largest_of_large_keys_that_differ_in_the_last_bit(device):
    keys = [0x7F7FFFF0 + i for i in (3, 0, 2, 1)]
    assert [kth(keys, k, 0, NAN_KEY, device) for k in (1, 2, 3, 4)] == [0x7F7FFFF0 + i for i in (3, 2, 1, 0)]


def test_kth_largest_where_too_few_reach_the_lower_bound(device):
    assert kth([1, 2, 3, 10], 3, 5, 10, device) == 5


def test_kth_largest_by_property(device):
    gen = torch.Generator().manual_seed(1)
    for P in (1, 2, 16, 64):
        for spread in (3, 1000, 2**31 - 1):
            keys = torch.randint(0, spread, (P,), generator=gen).tolist()
            for k in sorted({1, (P + 1) // 2, P}):
                assert kth(keys, k, 0, max(keys), device) == sorted(keys, reverse=True)[k - 1]
