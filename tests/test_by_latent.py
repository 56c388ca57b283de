"""The latent -> token index: complete, in order, split in bounds known beforehand, built without a host sync."""

from __future__ import annotations

import importlib

import pytest
import torch
from fastsae_kernels.by_latent import MAX_CHUNKS, SPLIT, LatentIndex, by_latent, chunk_size
from torch._subclasses.fake_tensor import FakeTensorMode

module = importlib.import_module("fastsae_kernels.by_latent")


def pairs_of(index: LatentIndex, latent: int) -> list[int]:
    offsets = index.offsets.tolist()
    return index.pairs[offsets[latent] : offsets[latent + 1]].tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("N", "K", "L"), [(1, 1, 1), (7, 3, 5), (123, 7, 255), (40, 9, 9)])
def test_every_pair_is_listed_once_in_order(N, K, L, dtype, device):
    top_indices = torch.randint(0, L, (N, K), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    index = by_latent(top_indices, None, L)
    assert index.pairs.dtype == index.offsets.dtype == torch.int64  # N·K may pass 2³¹
    flat = top_indices.flatten().tolist()
    for latent in range(L):
        assert pairs_of(index, latent) == [pair for pair, chosen in enumerate(flat) if chosen == latent]
    assert index.offsets[0] == 0
    assert index.offsets[-1] == N * K


def test_zero_activations_are_left_out_and_nan_is_not(device):
    top_indices = torch.tensor([[2, 0, 2], [0, 2, 1]], device=device)
    top_acts = torch.tensor([[0.5, 0.0, torch.nan], [-0.0, -1.0, torch.inf]], device=device)
    index = by_latent(top_indices, top_acts, 4)
    assert [pairs_of(index, latent) for latent in range(4)] == [[], [5], [0, 2, 4], []]
    assert index.pairs[4:].tolist() == [1, 3]


@pytest.mark.parametrize("split", [1, 2, 5, 256])
def test_chunks_and_remainders_cover_each_latent(split, monkeypatch, device):
    monkeypatch.setattr(module, "SPLIT", split)
    top_indices = (torch.rand(120, 4, generator=torch.Generator().manual_seed(0)) ** 4 * 30).long().to(device)
    index = by_latent(top_indices, None, 31)
    counts = index.offsets.diff().tolist()
    chunks = index.chunk_offsets.diff().tolist()
    assert index.split == split
    assert chunks == [count // split for count in counts]
    assert len(index.chunk_latents) == 480 // split  # the grid: known without looking at the data
    used = [latent for latent, n in enumerate(chunks) for _ in range(n)]
    assert index.chunk_latents.tolist() == used + [31] * (480 // split - len(used))


def test_two_hot_latents(device):
    top_indices = torch.tensor([[3, 1]], device=device).repeat(2 * SPLIT + 5, 1)
    index = by_latent(top_indices, None, 5)
    assert index.chunk_latents.tolist() == [1, 1, 3, 3]
    assert index.chunk_offsets.tolist() == [0, 0, 2, 2, 4, 4]


def test_partial_rows_do_not_grow_with_the_batch():
    assert chunk_size(1) == chunk_size(MAX_CHUNKS * SPLIT) == SPLIT
    for pairs in (10**6, 2**25, 2**33 + 1):
        split = chunk_size(pairs)
        assert MAX_CHUNKS // 2 <= pairs // split <= MAX_CHUNKS
        assert split % SPLIT == 0


def test_no_host_sync():
    with FakeTensorMode():  # tensors without data: any look at a value raises
        top_indices, top_acts = torch.empty(8192, 32, dtype=torch.int64), torch.empty(8192, 32)
        index = by_latent(top_indices, top_acts, 24576)
    assert index.pairs.shape == (8192 * 32,)
    assert index.offsets.shape == index.chunk_offsets.shape == (24577,)
    assert index.chunk_latents.shape == (8192 * 32 // SPLIT,)


def test_no_tokens(device):
    index = by_latent(torch.empty(0, 4, dtype=torch.int64, device=device), torch.empty(0, 4, device=device), 3)
    assert index.offsets.tolist() == index.chunk_offsets.tolist() == [0, 0, 0, 0]
    assert index.chunk_latents.tolist() == []


def test_more_latents_than_int32_can_name_are_refused():
    with pytest.raises(ValueError, match="fewer than 2³¹ latents"):
        by_latent(torch.zeros(1, 1, dtype=torch.int64), None, 2**31)
