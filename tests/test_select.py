"""The exact select, part by part and whole: groups, thresholds, the list of the best, rows of stored scores."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux")
import triton.language as tl  # noqa: E402
from fastsae_kernels import configs, reference  # noqa: E402
from fastsae_kernels.row_best import keep_best, write_row  # noqa: E402
from fastsae_kernels.row_candidates import group_column, row_threshold  # noqa: E402
from fastsae_kernels.select import select, select_scores  # noqa: E402


@triton.jit
def _columns_kernel(columns_ptr, STRIDE: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr):
    groups = tl.arange(0, P)[:, None]
    members = tl.arange(0, GROUP)[None, :]
    tl.store(columns_ptr + groups * GROUP + members, group_column(groups, members, STRIDE, GROUP))


@triton.jit
def _threshold_kernel(first_ptr, out_ptr, FLOOR: tl.constexpr, K: tl.constexpr, BEST: tl.constexpr, P: tl.constexpr):
    tl.store(out_ptr, row_threshold(tl.load(first_ptr + tl.arange(0, P)), FLOOR, K, BEST))


@triton.jit
def _best_kernel(
    ranks_ptr, windows, list_ptr, best_ptr, K: tl.constexpr, BEST: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    best = tl.zeros((BEST,), tl.int64)
    begin = tl.full((), 0, tl.int32)
    while begin < windows * WINDOW:
        ranks = tl.load(ranks_ptr + begin + tl.arange(0, WINDOW))
        best = keep_best(best, ranks, begin, list_ptr, K)
        begin += WINDOW
    tl.store(best_ptr + tl.arange(0, BEST), best)


@triton.jit
def _row_kernel(best_ptr, acts_ptr, indices_ptr, K: tl.constexpr, BEST: tl.constexpr):
    write_row(tl.load(best_ptr + tl.arange(0, BEST)), acts_ptr, indices_ptr, K)


# ---- the parts


@pytest.mark.parametrize(("STRIDE", "GROUP"), [(1, 4), (8, 16), (32, 8), (4, 1), (16, 2)])
def test_groups_part_the_columns(STRIDE, GROUP, device):
    """Every column has one group, whose members are STRIDE apart in a block of STRIDE · GROUP."""
    P = 2 * STRIDE
    columns = torch.full((P, GROUP), -1, dtype=torch.int32, device=device)
    _columns_kernel[(1,)](columns, STRIDE=STRIDE, GROUP=GROUP, P=P)
    assert columns.flatten().sort().values.tolist() == list(range(P * GROUP))
    assert (columns.diff(dim=1) == STRIDE).all()
    assert (columns // (STRIDE * GROUP) == columns[:, :1] // (STRIDE * GROUP)).all()


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("P", [4, 16, 64])
@pytest.mark.parametrize("floor", [1, 4])
def test_threshold_is_the_kth_maximum_or_the_floor(P, k, floor, device):
    gen = torch.Generator().manual_seed(P + k)
    for spread in (2, 5, 2**31 - 1):
        first = torch.randint(0, spread, (P,), generator=gen).int()
        kth = int(first.sort(descending=True).values[k - 1]) if k <= P else 0
        out = torch.zeros(1, dtype=torch.int32, device=device)
        _threshold_kernel[(1,)](first.to(device), out, FLOOR=floor, K=k, BEST=16, P=P)
        assert int(out) == max(kth, floor)


@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("BEST", [16, 32])
def test_the_best_are_kept_whatever_the_order(k, BEST, device):
    """Windows that hold the best first, last and in between; fewer than k; none."""
    WINDOW, windows = 16, 5
    gen = torch.Generator().manual_seed(k)
    distinct = torch.randperm(10**6, generator=gen)[: WINDOW * windows] + 1
    for ranks in (
        distinct, distinct.sort().values, distinct.sort(descending=True).values,
        torch.where(distinct < 10**5, distinct, 0), torch.zeros_like(distinct),
        torch.cat([torch.zeros(70, dtype=torch.int64), distinct[:10]]),
    ):  # fmt: skip
        best = torch.full((BEST,), -1, dtype=torch.int64, device=device)
        scratch = torch.empty(WINDOW + BEST, dtype=torch.int64, device=device)
        _best_kernel[(1,)](ranks.to(device), windows, scratch, best, K=k, BEST=BEST, WINDOW=WINDOW)
        assert best[:k].tolist() == ranks.sort(descending=True).values[:k].tolist()
        assert (best.diff() <= 0).all()


@pytest.mark.parametrize(("found", "indices"), [
    ([], [0, 1, 2, 3, 4]),
    ([(9.0, 3)], [3, 0, 1, 2, 4]),
    ([(9.0, 0), (8.0, 2), (7.0, 100)], [0, 2, 100, 1, 3]),
    ([(9.0, 4), (9.0, 5), (9.0, 6), (9.0, 7), (1.0, 0)], [4, 5, 6, 7, 0]),
    ([(math.inf, 2), (5.0, 1), (4.0, 0), (3.0, 9), (2.0, 8), (1.0, 7)], [2, 1, 0, 9, 8]),
])  # fmt: skip
def test_rows_are_filled_with_zeros_at_the_smallest_columns_left(found, indices, device):
    bits = torch.tensor([value for value, _ in found]).view(torch.int32).long()
    columns = torch.tensor([column for _, column in found], dtype=torch.int64)
    best = torch.zeros(16, dtype=torch.int64)
    best[: len(found)] = (bits << 32) | (columns ^ 0x7FFFFFFF)
    acts, written = torch.full((5,), math.nan, device=device), torch.full((5,), -1, device=device)
    _row_kernel[(1,)](best.to(device), acts, written, K=5, BEST=16)
    assert written.tolist() == indices
    assert acts.tolist() == [*[value for value, _ in found], 0.0, 0.0, 0.0, 0.0, 0.0][:5]


# ---- rows of stored scores


def check(scores: torch.Tensor, k: int, device: str, bias=None, mask=None, dtype=torch.float32) -> None:
    """Activations, indices and their order are the reference's."""
    scores = scores.to(device, dtype)
    acts = torch.full((len(scores), k), math.nan, device=device)
    indices = torch.full((len(scores), k), -1, device=device)
    select_scores(scores, bias, mask, k, "topk", acts, indices)
    wanted = scores.float() if bias is None else scores.float() + bias
    wanted = wanted.relu() if mask is None else wanted.relu().masked_fill(~mask, 0.0)
    chosen = reference.select(wanted, k)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(acts, wanted.gather(1, chosen), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("L", "k"), [(1, 1), (7, 1), (7, 7), (255, 1), (507, 31), (123, 123), (64, 17)])
def test_odd_sizes_with_ties(L, k, device):
    gen = torch.Generator().manual_seed(L)
    check(torch.randint(-3, 4, (3, L), generator=gen).float(), k, device)
    check(torch.randn(3, L, generator=gen), k, device)


def test_every_kind_of_row_at_once(device):
    """Ties, nothing positive, NaN, both infinities, one winner; with a bias and a mask that hide the best."""
    L = 90
    scores = torch.randn(7, L, generator=torch.Generator().manual_seed(0))
    scores[0], scores[1], scores[2] = 1.0, -1.0, math.nan
    scores[3, [80, 5, 6]] = math.inf
    scores[4, 3:] = -math.inf
    scores[5], scores[5, 77] = 0.0, 1.0
    scores[6, [1, 89]] = torch.tensor([math.nan, -math.nan])
    mask = torch.ones(L, dtype=torch.bool)
    mask[[80, 77, 0]] = False
    bias = torch.linspace(-0.5, 0.5, L)
    for k in (1, 6, 33):
        check(scores, k, device)
        check(scores, k, device, bias.to(device), mask.to(device))


@pytest.mark.parametrize("winners", [2, 3, 8])
def test_winners_that_share_a_group(winners, device):
    """Group g of a row has the columns g + i · LANES: all winners in one group, then in each of two."""
    L = 256
    lanes = configs.select_config(L, 9, torch.device(device)).LANES
    scores = torch.rand(2, L, generator=torch.Generator().manual_seed(2)) / 2
    members = torch.arange(3, L, lanes)[:winners]
    scores[0, members] = 1 + torch.rand(len(members), generator=torch.Generator().manual_seed(3))
    scores[1, members] = 1.0
    scores[1, members[:-1] + 1] = 1.0
    check(scores, 9, device)


def test_more_ties_than_a_window_holds(device, monkeypatch):
    monkeypatch.setattr(configs, "window", lambda k, extra: 16)
    check(torch.ones(2, 200), 9, device)
    check(torch.cat([torch.zeros(2, 150), torch.ones(2, 50)], dim=1), 16, device)


def test_large_selections_are_sorted(device, monkeypatch):
    monkeypatch.setattr(configs, "MAX_SELECT_K", 8)
    scores = torch.randint(-3, 9, (3, 40), generator=torch.Generator().manual_seed(4)).float()
    for k in (8, 9, 40):
        check(scores, k, device, torch.zeros(40, device=device), (torch.arange(40) % 3 > 0).to(device))


def test_select_refuses_float64(device):
    with pytest.raises(ValueError, match='got torch.float64; use implementation="reference"'):
        select(torch.ones(1, 4, dtype=torch.float64, device=device), 2)


def test_an_empty_batch(device):
    assert select(torch.ones(0, 4, device=device), 2).shape == (0, 2)
