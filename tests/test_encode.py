"""The Triton encoders against the reference: by property, at every kind of tie, and no worse than torch.

Both paths (fused; GEMM + select) are held to the same contract. Where an exact set is asserted on random data, the
data are small integers, whose products every order of summation gives exactly; there ties are everywhere.
"""

import math

import pytest
import torch
from fastsae_kernels import configs, gpu, reference
from fastsae_kernels.encode import encode
from fastsae_kernels.select import select
from fastsae_kernels.testing import assert_no_worse, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

PATHS = ["fused", "chunked"]
SHAPES = [(1, 7, 16, 1), (3, 33, 123, 7), (2, 16, 255, 33), (2, 48, 64, 64), (2, 20, 507, 5)]  # N, D, L, k
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def integers(N: int, D: int, L: int, device: str, dtype=torch.float32, seed: int = 0):
    """x, weight and bias of small integers: exact in every dtype and order of summation, full of ties."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (N, D), generator=gen)
    weight = torch.randint(-2, 3, (L, D), generator=gen)
    bias = torch.randint(-3, 3, (L,), generator=gen)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def assert_is_reference(x, weight, bias, k, *, path, activation="topk", latent_mask=None) -> None:
    acts, indices = encode(x, weight, bias, k, activation, latent_mask, path=path)
    wanted = reference.topk_encode(x, weight, bias, k, activation=activation, latent_mask=latent_mask)
    assert acts.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(acts, wanted.top_acts, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, wanted.top_indices)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_with_ties_everywhere(shape, dtype, path, device):
    N, D, L, k = shape
    assert_is_reference(*integers(N, D, L, device, dtype), k, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch_on_real_scores(dtype, path, device):
    """Values beside torch's at the same dtype; the set by regret: the activation lost to a float64 choice.

    Floor: a row of 96 products in float32, in any order, is off by at most 96 · 2^-24 of its size.
    """
    x, weight, bias, _, b_dec = make_inputs(6, 96, 150, dtype=dtype, device=device)
    x = reference.center(x, b_dec)
    acts, indices = encode(x, weight, bias, 9, path=path)
    truth = torch.relu(x.double() @ weight.double().T + bias.double())
    torch_scores = torch.relu(torch.nn.functional.linear(x, weight, bias))
    floor = 96 * 2.0**-24
    assert_no_worse(acts, torch_scores.gather(1, indices), truth.gather(1, indices), floor=floor)
    best = truth.topk(9, dim=1).values
    regret = (best.sum(1) - truth.gather(1, indices).sum(1)) / best.sum(1).clamp_min(1e-9)
    assert regret.max() <= 9 * floor
    assert (acts[:, :-1] >= acts[:, 1:]).all()
    assert all(len(set(row)) == 9 for row in indices.tolist())


@pytest.mark.parametrize("path", PATHS)
def test_all_negative_rows_give_zeros_at_the_smallest_indices(path, device):
    x = torch.ones(3, 8, device=device)
    weight, bias = -torch.ones(40, 8, device=device), torch.zeros(40, device=device)
    acts, indices = encode(x, weight, bias, 6, path=path)
    assert acts.tolist() == [[0.0] * 6] * 3
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("path", PATHS)
def test_fewer_positive_than_k(path, device):
    x, weight, bias = integers(4, 5, 60, device)
    bias = torch.full_like(bias, -100.0)
    bias[[3, 41, 59]] = 100.0
    assert_is_reference(x, weight, bias, 8, path=path)
    _, indices = encode(x, weight, bias, 8, path=path)
    assert (indices[:, 3:].sort().values == torch.tensor([0, 1, 2, 4, 5], device=device)).all()


@pytest.mark.parametrize("path", PATHS)
def test_infinities(path, device):
    x, weight, bias = integers(4, 5, 60, device)
    bias[[7, 30, 31]] = math.inf
    bias[[2, 8, 44]] = -math.inf
    assert_is_reference(x, weight, bias, 5, path=path)
    acts, indices = encode(x, weight, bias, 5, path=path)
    assert indices[:, :3].tolist() == [[7, 30, 31]] * 4
    assert acts[:, :3].isinf().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_ranks_first_and_is_returned(path, sign, device):
    nan = math.copysign(math.nan, sign)
    x, weight, bias = integers(4, 8, 60, device)
    x[1, 3] = nan
    acts, indices = encode(x, weight, bias, 5, path=path)
    assert acts[1].isnan().all()
    assert indices[1].tolist() == [0, 1, 2, 3, 4]
    clean = [0, 2, 3]
    assert_is_reference(x[clean], weight, bias, 5, path=path)

    x, weight, bias = integers(4, 8, 60, device)
    weight[[50, 9]] = nan
    acts, indices = encode(x, weight, bias, 5, path=path)
    assert indices[:, :2].tolist() == [[9, 50]] * 4
    assert acts[:, :2].isnan().all()
    assert acts[:, 2:].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_duplicated_latents_tie_by_index_wherever_they_stand(path, device):
    x, weight, bias, *_ = make_inputs(6, 24, 96, device=device)
    weight[[70, 1, 2, 33, 94]] = weight[5].clone()  # in the same groups and in others
    bias[[70, 1, 2, 33, 94]] = bias[5].clone() + 50
    bias[5] += 50
    acts, indices = encode(x, weight, bias, 4, path=path)
    assert indices.tolist() == [[1, 2, 5, 33]] * 6
    assert (acts == acts[:, :1]).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [3, 5, 16])
def test_many_winners_in_one_group(path, k, device):
    """The repair: whole groups of the interpreter's and the GPUs' tiles hold the winners, wherever groups lie."""
    x = torch.ones(2, 4, device=device)
    weight = torch.zeros(128, 4, device=device)
    bias = torch.arange(128, device=device).remainder(7).float() / 8
    for block in (range(0, 16), range(32, 128, 16), range(64, 128, 8), range(3, 128, 4)):
        crowded = bias.clone()
        for rank, column in enumerate(block):
            crowded[column] = 10 + (rank * 5) % 11  # unequal, in no order, with ties
        assert_is_reference(x, weight, crowded, k, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_scores_that_differ_only_in_the_last_bits(path, device):
    """Keys lose their low bits on the fused path: near-ties, and more of them than k, are decided by full values."""
    base = torch.tensor(1.0).view(torch.int32)
    step = torch.randperm(200, generator=torch.Generator().manual_seed(1)).int() % 37
    bias = (base + step).view(torch.float32).to(device)
    weight, x = torch.zeros(200, 4, device=device), torch.zeros(3, 4, device=device)
    for k in (1, 6, 40):
        assert_is_reference(x, weight, bias, k, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_everything_ties(path, device):
    weight, bias = torch.zeros(150, 4, device=device), torch.ones(150, device=device)
    assert_is_reference(torch.zeros(2, 4, device=device), weight, bias, 11, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_clustered_scores(path, device):
    x, weight, bias = integers(5, 12, 200, device)
    bias[180:] += 40
    assert_is_reference(x, weight, bias, 13, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("allowed", [0, 3, 50])
def test_latents_outside_the_mask_count_as_zero(path, activation, allowed, device):
    x, weight, bias = integers(4, 9, 120, device)
    mask = torch.zeros(120, dtype=torch.bool, device=device)
    mask[torch.randperm(120, generator=torch.Generator().manual_seed(0))[:allowed].to(device)] = True
    assert_is_reference(x, weight, bias, 8, path=path, activation=activation, latent_mask=mask)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("L", "k"), [(60, 5), (63, 7), (48, 48), (96, 1), (21, 3)])
def test_groupmax(path, L, k, device):
    assert_is_reference(*integers(6, 10, L, device), k, path=path, activation="groupmax")


@pytest.mark.parametrize("path", PATHS)
def test_scratch_is_bounded_and_rows_are_cut_without_a_seam(path, device, monkeypatch):
    x, weight, bias = integers(37, 6, 48, device)
    monkeypatch.setattr(configs, "CHUNK_BYTES", 2048)
    assert_is_reference(x, weight, bias, 4, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_runs_are_bit_identical(path, device):
    x, weight, bias, *_ = make_inputs(9, 40, 200, device=device)
    first, second = (encode(x, weight, bias, 7, path=path) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_both_paths_give_one_set_and_full_values(device):
    x, weight, bias, *_ = make_inputs(5, 32, 160, device=device)
    fused, chunked = (encode(x, weight, bias, 10, path=path) for path in PATHS)
    torch.testing.assert_close(fused[0], chunked[0], rtol=1e-5, atol=1e-5)
    scores = torch.relu(x.double() @ weight.double().T + bias.double())
    torch.testing.assert_close(scores.gather(1, fused[1]), scores.gather(1, chunked[1]), rtol=1e-5, atol=1e-5)


def test_empty_batch_and_non_contiguous_input(device):
    x, weight, bias = integers(6, 8, 40, device)
    for path in PATHS:
        acts, indices = encode(x[:0], weight, bias, 3, path=path)
        assert acts.shape == indices.shape == (0, 3)
        assert_is_reference(x.T.contiguous().T, weight.T.contiguous().T, bias, 3, path=path)


def test_refusals(device):
    x, weight, bias = integers(2, 4, 32, device)
    with pytest.raises(ValueError, match=r'got torch.float64; use implementation="reference"'):
        encode(x.double(), weight.double(), bias.double(), 2)
    with pytest.raises(ValueError, match="expected 'auto', 'fused' or 'chunked', got 'fast'"):
        encode(x, weight, bias, 2, path="fast")
    big = torch.zeros(600, 4, device=device)
    with pytest.raises(ValueError, match="expected k <= 512"):
        encode(x, big, big[:, 0].contiguous(), 513, path="fused")
    acts, _ = encode(x, big, big[:, 0].contiguous(), 513)  # auto takes the other path
    assert acts.shape == (2, 513)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "k"), [(16, 1), (123, 7), (255, 32), (48, 48), (64, 33)])
def test_select_equals_the_reference(L, k, dtype, device):
    gen = torch.Generator().manual_seed(L)
    scores = torch.randn(4, L, generator=gen).mul(4).round().div(4).relu().to(device, dtype)
    scores[0] = 0
    scores[1, L // 2] = math.inf
    scores[2, [0, L - 1]] = math.nan
    assert torch.equal(select(scores, k), reference.select(scores, k))
    if L % k == 0:
        assert torch.equal(select(scores, k, "groupmax"), reference.select(scores, k, "groupmax"))


def test_select_of_fine_grained_scores(device):
    scores = torch.rand(5, 400, generator=torch.Generator().manual_seed(0)).to(device)
    indices = select(scores, 20)
    assert torch.equal(scores.gather(1, indices), scores.topk(20, dim=1).values)


@pytest.mark.parametrize(("GROUP", "STRIDE"), [(4, 1), (8, 2), (2, 8), (16, 1)])
def test_other_groups_give_the_same(GROUP, STRIDE, device, monkeypatch):
    """Groups as GPUs have them: of neighbours where there are no matrix units, and of other numbers of members."""
    used = []
    tile = configs.EncodeConfig(16, 16, 16, GROUP, STRIDE, num_warps=4, num_stages=1)
    monkeypatch.setattr(configs, "default_encode", lambda *_: used.append(1) or tile)
    for seed, k in enumerate((1, 9)):
        assert_is_reference(*integers(3, 12, 90, device, seed=seed), k, path="fused")
    assert used


def test_few_programs_take_all_tiles(device, monkeypatch):
    """A persistent product: fewer programs than tiles, and a number of tiles that they do not divide."""
    tile = configs.EncodeConfig(16, 16, 16, 4, 4, num_warps=4, num_stages=1, persistent=True)
    programs = []
    monkeypatch.setattr(configs, "default_encode", lambda *_: tile)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: programs.append(4) or 4)
    for seed, k in enumerate((1, 9)):
        assert_is_reference(*integers(37, 12, 90, device, seed=seed), k, path="fused")  # 3 * 6 tiles
    assert len(programs) == 2


def test_equal_latents_tie_by_index_where_a_block_is_wider_than_the_window(device, monkeypatch):
    """Blocks of 64 columns and windows of 16, as GPUs have them larger: no early exit may skip a smaller index."""
    used = []
    wide = configs.EncodeConfig(16, 64, 16, 4, 16, num_warps=4, num_stages=1)
    monkeypatch.setattr(configs, "default_encode", lambda *_: used.append(1) or wide)
    for seed in range(3):
        gen = torch.Generator().manual_seed(seed)
        row, x = torch.randn(40, generator=gen), torch.randn(4, 40, generator=gen)
        x = torch.where((x @ row)[:, None] > 0, x, -x).to(device)
        weight = row.expand(128, 40).contiguous().to(device)
        acts, indices = encode(x, weight, torch.zeros(128, device=device), 7, path="fused")
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 4
        assert (acts == acts[:, :1]).all()
    assert used
