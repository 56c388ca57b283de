"""The CPU primitives against the reference: exact selection, gradients, and the screen's proof.

Small integers are exact in bfloat16 and in float32 under any order of summation, and they tie all the time: with
them "the same set, the same order" can be asserted without a tolerance.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fastsae_kernels import cpu, cpu_linear, cpu_screen, reference, sparse_decode, topk_encode
from fastsae_kernels.cpu_sampled import sampled_products
from fastsae_kernels.testing import assert_no_worse, make_inputs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("two_threads")

ONEDNN = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")),
]
SCREENS = [False, True]
SHAPES = [  # N, D, L, k
    (1, 1, 1, 1),
    (1, 7, 123, 5),
    (7, 5, 255, 1),
    (3, 8, 507, 507),
    (33, 16, 507, 50),
    (40, 24, 2048, 3),
    (65, 9, 4099, 31),
]


@pytest.fixture(params=ONEDNN, ids=["blas", "onednn"])
def library(request, monkeypatch):
    """Float32 products by either of torch's libraries, whatever CPU this is."""
    monkeypatch.setattr(cpu_linear, "_faster", lambda: request.param)
    return request.param


def integers(N: int, D: int, L: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (N, D), generator=gen).to(dtype)
    weight = torch.randint(-2, 3, (L, D), generator=gen).to(dtype)
    return x, weight, torch.randint(-4, 5, (L,), generator=gen).to(dtype)


def truth(x, weight, bias, k, activation="topk", mask=None) -> tuple[Tensor, Tensor]:
    out = reference.topk_encode(
        x.double(), weight.double(), bias.double(), k, activation=activation, latent_mask=mask
    )  # fmt: skip
    return out.top_acts, out.top_indices


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert actual[1].dtype == torch.int64
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(actual[0].double(), expected[0].double(), rtol=0, atol=0, equal_nan=True)


def staircase(L: int, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Scores 1 + l / 65536: all different in float32, 512 of them the same in bfloat16."""
    weight = torch.zeros(L, D)
    weight[:, 0] = 1 + torch.arange(L) / 65536
    x = torch.zeros(5, D)
    x[:, 0] = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0])
    return x, weight, torch.zeros(L)


# ---- selection


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encode_equals_reference_with_ties_everywhere(shape, screen, library):
    N, D, L, k = shape
    x, weight, bias = integers(N, D, L)
    assert_same(cpu.encode(x, weight, bias, k, screen=screen), truth(x, weight, bias, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("screen", SCREENS)
def test_encode_other_dtypes(dtype, screen, library):
    x, weight, bias = integers(21, 16, 1500, dtype=dtype)
    acts, indices = cpu.encode(x, weight, bias, 11, screen=screen)
    assert acts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same((acts, indices), truth(x, weight, bias, 11))


@pytest.mark.parametrize("screen", SCREENS)
def test_encode_real_values_regret_nothing(screen, library):
    inputs = make_inputs(123, 96, 3001, seed=1)
    acts, indices = cpu.encode(inputs.x, inputs.weight, inputs.bias, 17, screen=screen)
    scores = reference.scores(inputs.x.double(), inputs.weight.double(), inputs.bias.double()).relu()
    expected = scores.topk(17).values
    # float32 products of D = 96 terms: near-ties may swap, so compare the sorted float64 scores of both sets
    chosen = scores.gather(1, indices).sort(1, descending=True).values
    torch.testing.assert_close(chosen, expected, rtol=0, atol=96 * 2.0**-24 * float(expected.max()))
    plain = reference.scores(inputs.x, inputs.weight, inputs.bias).relu().gather(1, indices)
    # floor: another order of summing 96 products, each rounded to 2^-24
    assert_no_worse(acts, plain, scores.gather(1, indices), floor=96 * 2.0**-24)
    assert (acts[:, :-1] >= acts[:, 1:]).all()


@pytest.mark.parametrize("screen", SCREENS)
def test_all_negative_rows_take_the_first_latents(screen, library):
    x, weight, bias = integers(9, 8, 700)
    before = cpu.screen_stats().fallbacks
    acts, indices = cpu.encode(x, weight, bias - 1000, 13, screen=screen)
    assert cpu.screen_stats().fallbacks == before  # a bound below 0 proves as much as a k-th activation above it
    assert not acts.any()
    assert (indices == torch.arange(13)).all()


@pytest.mark.parametrize("screen", SCREENS)
def test_zeros_fill_the_smallest_free_indices(screen, library):
    x, weight, _ = integers(1, 4, 900)
    bias = torch.full((900,), -1e4)
    bias[[1, 3, 700]] = torch.tensor([20000.0, 30000.0, 40000.0])
    acts, indices = cpu.encode(x, weight, bias, 6, screen=screen)
    assert indices.tolist() == [[700, 3, 1, 0, 2, 4]]
    assert (acts > 0).tolist() == [[True] * 3 + [False] * 3]


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_not_finite(where, value, screen, library):
    x, weight, bias = integers(6, 8, 640)
    x[:, 0] = torch.tensor([1.0, -1, 2, 3, -2, 1])  # no 0·inf by chance
    {"x": x, "weight": weight, "bias": bias}[where].view(-1)[0] = value
    assert_same(cpu.encode(x, weight, bias, 9, screen=screen), truth(x, weight, bias, 9))


@pytest.mark.parametrize("screen", SCREENS)
def test_duplicated_latents_tie_by_index(screen, library):
    inputs = make_inputs(31, 33, 500, seed=3)  # rows of 33 floats start at every alignment
    weight, bias = inputs.weight.repeat(4, 1), torch.zeros(2000)
    acts, indices = cpu.encode(inputs.x, weight, bias, 8, screen=screen)
    first = indices.view(31, 2, 4)
    assert (first == first[:, :, :1] + 500 * torch.arange(4)).all()
    torch.testing.assert_close(acts.view(31, 2, 4).amax(2), acts.view(31, 2, 4).amin(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("allowed", [0, 1, 5, 30, 400, 999, 1000])
@pytest.mark.parametrize("screen", SCREENS)
def test_latent_mask(allowed, screen):
    x, weight, bias = integers(20, 8, 1000)
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[torch.randperm(1000, generator=torch.Generator().manual_seed(5))[:allowed]] = True
    assert_same(cpu.encode(x, weight, bias, 7, "topk", mask, screen=screen), truth(x, weight, bias, 7, "topk", mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3, 37, 111])
def test_groupmax(k, masked):
    x, weight, bias = integers(13, 4, 111, seed=2)
    mask = torch.arange(111) % 3 > 0 if masked else None
    bias -= 6  # many groups without a positive score
    actual = cpu.encode(x, weight, bias, k, "groupmax", mask)
    assert_same(actual, truth(x, weight, bias, k, "groupmax", mask))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 40, 40), (9, 1000, 1), (12, 2049, 20), (30, 5000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_select(shape, dtype):
    N, L, k = shape
    gen = torch.Generator().manual_seed(N)
    few = torch.randint(0, 40, (N, L), generator=gen).to(dtype)  # ties inside and across groups
    many = torch.randn(N, L, generator=gen).relu().to(dtype)
    rare = many.masked_fill(torch.rand(N, L, generator=gen) < 0.995, 0.0)
    rare[0, L // 2] = torch.nan
    for pre_acts in (few, many, rare):
        torch.testing.assert_close(cpu.select(pre_acts, k), reference.select(pre_acts, k), rtol=0, atol=0)
    assert torch.equal(
        cpu.select(few[:, : L - L % k], k, "groupmax"), reference.select(few[:, : L - L % k], k, "groupmax")
    )


def test_chunks_do_not_change_the_result(monkeypatch):
    x, weight, bias = integers(37, 8, 800)
    whole = [cpu.encode(x, weight, bias, 9, screen=screen) for screen in SCREENS]
    monkeypatch.setattr(cpu, "SCRATCH", 5 * 800 * 4)
    assert cpu.chunk_rows(torch.float32, 37, 800) == 5
    for screen, expected in zip(SCREENS, whole, strict=True):
        assert_same(cpu.encode(x, weight, bias, 9, screen=screen), expected)


# ---- the screen


@pytest.mark.parametrize(("L", "fallbacks"), [(640, 0), (5120, 5)])  # the first can still be scored again, all of them
def test_scores_bfloat16_cannot_tell_apart_come_out_right(L, fallbacks):
    x, weight, bias = staircase(L)
    expected = torch.arange(L - 1, L - 9, -1).expand(5, -1)
    plain = (x.bfloat16() @ weight.bfloat16().t() + bias.bfloat16()).topk(8).indices
    assert set(plain[0].tolist()) != set(expected[0].tolist())
    before = cpu.screen_stats()
    acts, indices = cpu.encode(x, weight, bias, 8, screen=True)
    after = cpu.screen_stats()
    assert after.rows - before.rows == 5
    assert after.fallbacks - before.fallbacks == fallbacks
    assert torch.equal(indices, expected)
    assert torch.equal(acts, x[:, :1] * weight[expected[0], 0])


def test_plain_bfloat16_ranking_is_wrong_where_the_screen_is_certain():
    inputs = make_inputs(64, 128, 4096, seed=4)
    x, weight, bias = inputs.x, inputs.weight, torch.zeros(4096)
    exact = reference.scores(x.double(), weight.double(), bias.double())
    top = exact.topk(17)
    clear = top.values[:, 15] - top.values[:, 16] > 1e-4  # float32 can tell the 16th from the 17th
    expected = top.indices[:, :16].sort(1).values
    plain = (x.bfloat16() @ weight.bfloat16().t()).topk(16).indices.sort(1).values
    before = cpu.screen_stats()
    _, indices = cpu.encode(x, weight, bias, 16, screen=True)
    assert (plain != expected).any(1)[clear].sum() >= 5
    assert torch.equal(indices.sort(1).values[clear], expected[clear])
    assert cpu.screen_stats().fallbacks - before.fallbacks < 32  # most were proven, not recomputed


def test_without_its_bound_the_screen_would_be_wrong(monkeypatch):
    weight = torch.ones(2000, 128)
    weight[:, :64] += 2.0**-7 * (torch.rand(2000, 64, generator=torch.Generator().manual_seed(0)) < 0.3)
    weight[7::100, :64] = 1 + 0.98 * 2.0**-8  # the best ones, in bfloat16 the worst: all of it is rounded away
    x, bias = torch.cat([torch.ones(3, 64), -torch.ones(3, 64)], 1), torch.zeros(2000)
    best = torch.arange(7, 2000, 100)[:16].expand(3, -1)
    assert torch.equal(cpu.encode(x, weight, bias, 16, screen=True)[1], best)
    as_if_exact = lambda weakest, *_, **__: weakest.double() - 1e-9  # noqa: E731
    monkeypatch.setattr(cpu_screen, "excluded_bound", as_if_exact)
    assert not torch.isin(cpu.encode(x, weight, bias, 16, screen=True)[1], best).any()


@pytest.mark.parametrize("seed", range(40))
def test_bound_holds_for_adversarial_magnitudes(seed):
    """The bound has no tolerance; a certified row's k-th activation is what float32 makes of the k-th exact score."""
    gen = torch.Generator().manual_seed(seed)
    N, k = 24, 4
    D, L = [(1, 200), (3, 400), (64, 600), (257, 333)][seed % 4]
    x, weight = torch.randn(N, D, generator=gen), torch.randn(L, D, generator=gen)
    bias = torch.randn(L, generator=gen) * 10.0 ** (seed % 5 - 3)
    kind = seed // 4 % 5
    if kind == 0:  # near-copies of a few rows, a bfloat16 rounding apart
        weight = weight[torch.randint(0, 9, (L,), generator=gen)] * (1 + torch.rand(L, 1, generator=gen) * 2**-7)
    if kind == 1:  # elements of wildly different size
        weight *= 10.0 ** torch.randint(-6, 7, (L, D), generator=gen)
        x *= 10.0 ** torch.randint(-6, 7, (N, D), generator=gen)
    if kind == 2:  # squares and products underflow, or overflow
        weight *= 10.0 ** (30 * (seed // 20 * 2 - 1))
        x *= 10.0 ** torch.randint(-38, 38, (N, 1), generator=gen)
        bias *= 0  # or it would hide the products
    if kind == 3:  # halfway between two bfloat16 values, all rounded the same way
        weight = (weight.bfloat16().float() * (1 + 2.0**-8)).abs()
        x = (x.bfloat16().float() * (1 + 2.0**-8)).abs()
    if kind == 4:  # exact operands; what cancels is lost in the float32 sum and in the stored product and bias
        weight, x = weight.bfloat16().float(), x[:1].bfloat16().float().repeat(N, 1)
        weight[:, -1] = -weight[:, 0] * 2**30
        weight[:, 0], x[:, -1] = weight[:, 0] * 2**30, x[:, 0]
        if D == 1:  # the worst for two roundings: the bias undoes the product, both just above a power of two
            x[:] = 1 + 5 / 128
            weight = 1 + torch.randint(0, 12, (L, 1), generator=gen) / 128
            bias = -(x[0] * weight).sum(1) * (1 + 2.0**-8 * torch.rand(L, generator=gen))
    coder = cpu_screen.round_coder(weight, bias)
    low = x.bfloat16()
    exact = (x.double() @ weight.double().t() + bias.double()).flatten()
    product = low @ coder.weight.t()
    for stored in (torch.addmm(coder.bias, low, coder.weight.t()), product + coder.bias):
        # as if each score in turn were the weakest candidate's
        each, each_low = x.repeat_interleave(L, 0), low.repeat_interleave(L, 0)
        assert (exact <= cpu_screen.excluded_bound(stored.flatten(), each, each_low, coder)).all()
    acts, indices, certified = cpu_screen.screened_topk(x, weight, bias, k, N)
    size = (x.double().norm(dim=1) * weight.double().norm(dim=1).max() + bias.abs().max())[:, None]
    rounding = (D + 8) * 2.0**-23 * size + 1e-37  # which float32 may flush to 0
    excluded = exact.view(N, L).scatter(1, indices, -torch.inf).amax(1).relu()
    assert (excluded <= acts[:, -1].double() + rounding[:, 0])[certified].all()
    full, _ = cpu.encode(x, weight, bias, k, screen=True)
    plain = reference.scores(x, weight, bias).relu().topk(k).values
    close = (full.double() - plain.double()).abs() <= rounding
    assert (close | (size > 1e37)).all()  # beyond, float32 overflows in an order of its own


def test_the_bound_is_not_so_wide_that_nothing_is_certified():
    inputs = make_inputs(128, 256, 4096, seed=6)
    inputs.bias[:100] = -torch.inf  # latents switched off cost no certificate
    *_, certified = cpu_screen.screened_topk(inputs.x, inputs.weight, inputs.bias, 16, 64)
    assert certified.float().mean() > 0.9


def test_screen_gives_up_on_a_coder_it_cannot_certify():
    x, weight, bias = staircase(5120)
    before = cpu.screen_stats()
    *_, certified = cpu_screen.screened_topk(x, weight, bias, 8, 2)
    assert not certified.any()
    assert cpu.screen_stats().rows - before.rows == 2  # the first chunk only


def test_screen_of_a_width_of_zero_ranks_the_bias():
    x, weight, bias = torch.zeros(3, 0), torch.zeros(64, 0), torch.linspace(-1, 1, 64)
    acts, indices = cpu.encode(x, weight, bias, 2, screen=True)
    assert torch.equal(acts, bias[[63, 62]].expand(3, 2))
    assert indices.tolist() == 3 * [[63, 62]]


@pytest.mark.parametrize("D", [1, 7, 96, 255])
@pytest.mark.parametrize("N", [1, 2, 33])
def test_scores(N, D, library, monkeypatch):
    """Beside float64, of rows that lie any way in memory; what oneDNN cannot do is not given to it."""
    inputs = make_inputs(N, D, 123, seed=2)
    truth = inputs.x.double() @ inputs.weight.double().T + inputs.bias.double()
    plain = torch.addmm(inputs.bias, inputs.x, inputs.weight.T)
    for x, weight in (
        (inputs.x, inputs.weight),
        (inputs.x.T.contiguous().T, inputs.weight.T.contiguous().T),
        (inputs.x.repeat(1, 2)[:, :D], inputs.weight.repeat(1, 3)[:, :D]),
    ):
        scratch = cpu_linear.scratch_for(x, weight, N + 1)
        assert (scratch is None) is library
        assert_no_worse(cpu_linear.scores(x, weight, inputs.bias, scratch), plain, truth, floor=D * 2.0**-24)
    assert not cpu_linear.by_onednn(inputs.x.double(), inputs.weight.double())
    assert not cpu_linear.by_onednn(inputs.x[:0], inputs.weight)
    assert not cpu_linear.by_onednn(inputs.x[:, :0], inputs.weight[:, :0])
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not cpu_linear.by_onednn(inputs.x, inputs.weight)


def test_onednn_is_for_amd(monkeypatch):
    for name, faster in (("AMD EPYC", True), ("Intel(R) Xeon(R) Processor", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        assert cpu_linear._faster.__wrapped__() is (faster and torch.backends.mkldnn.is_available())


def test_screen_is_chosen_only_where_bfloat16_is_fast(monkeypatch):
    x, weight = torch.empty(2048, 768, device="meta"), torch.empty(12288, 768, device="meta")
    amx, amd, neither = (True, False, ""), (False, True, "AMD EPYC"), (False, True, "Intel(R) Core(TM)")
    for tiles, bf16, name in (amx, amd, neither):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=tiles: value)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=bf16: value)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda value=name: {"cpu_name": value})
        fast = tiles or "AMD" in name
        assert cpu_screen.pays(x, weight, 32) is fast
        assert not cpu_screen.pays(x[:128], weight, 32)  # rounding the weights costs more than it saves
        assert cpu_screen.pays(x[:256], weight, 32) is tiles
        assert cpu_screen.pays(x[:, :128], weight[:, :128], 32) is fast
        assert cpu_screen.pays(x[:, :128], weight[:4095, :128], 32) is tiles
        assert not cpu_screen.pays(x[:512, :128], weight[:, :128], 32)
        assert not cpu_screen.pays(x[:, :63], weight[:, :63], 32)
        assert not cpu_screen.pays(x, weight, 193)


# ---- products


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_sampled_products(weight_dtype):
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 8, (11, 19), generator=gen).float()
    weight = torch.randint(-8, 8, (50, 19), generator=gen).to(weight_dtype)
    indices = torch.randint(0, 50, (11, 6), generator=gen)
    indices[:, 1] = indices[:, 0]
    expected = (x @ weight.float().t()).gather(1, indices)
    assert torch.equal(sampled_products(x, weight, indices), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_decode(dtype, index_dtype):
    gen = torch.Generator().manual_seed(1)
    acts, W_dec = torch.rand(23, 9, generator=gen), torch.randn(123, 31, generator=gen).to(dtype)
    indices = torch.randint(0, 123, (23, 9), generator=gen).to(index_dtype)
    indices[0] = 7  # repeated ones add up
    b_dec = torch.randn(31, generator=gen).to(dtype)
    exact = reference.sparse_decode(acts.double(), indices.long(), W_dec.double(), b_dec.double())
    actual = cpu.decode(acts, indices, W_dec, b_dec)
    assert actual.dtype == dtype
    # floor: nine products and a sum in float32, in another order
    assert_no_worse(actual, exact.to(dtype), exact, floor=10 * 2.0**-24 if dtype != torch.float64 else 1e-15)


def skewed_slots(N: int, K: int, L: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Acts and indices where latent 0 takes every token, others ever fewer, and a fifth of the acts is 0."""
    gen = torch.Generator().manual_seed(seed)
    indices = (torch.rand(N, K, generator=gen) ** 4 * L).long()
    indices[:, 0] = 0
    acts = torch.rand(N, K, generator=gen) + 0.1
    return acts.masked_fill(torch.rand(N, K, generator=gen) < 0.2, 0.0), indices


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 123, 5), (255, 16, 507, 32), (64, 32, 40, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backwards(shape, dtype):
    N, K, L, D = shape
    acts, indices = skewed_slots(N, K, L)
    gen = torch.Generator().manual_seed(2)
    rows, W_dec = torch.randn(N, D, generator=gen).to(dtype), torch.randn(L, D, generator=gen).to(dtype)
    acc = reference.accumulator_dtype(dtype)
    acts = acts.to(acc)
    dense = torch.zeros(N, L, dtype=torch.float64).scatter_add(1, indices, acts.double())  # [N, L]
    plain = dense.to(acc).t() @ rows.to(acc)
    # floor: sums of up to N float32 products in another order
    floor = N * 2.0**-24 if dtype != torch.float64 else 1e-14

    d_weight, d_bias = cpu.encode_backward(acts, indices, rows, L)
    assert d_weight.dtype == d_bias.dtype == acc
    assert_no_worse(d_weight, plain, dense.t() @ rows.double(), floor=floor)
    assert_no_worse(d_bias, dense.to(acc).sum(0), dense.sum(0), floor=floor)

    d_acts, d_W_dec = cpu.decode_backward(rows, acts, indices, W_dec)
    assert d_acts.dtype == d_W_dec.dtype == acc
    exact = (rows.double() @ W_dec.double().t()).gather(1, indices)  # also where the act is 0
    assert_no_worse(d_acts, (rows.to(acc) @ W_dec.to(acc).t()).gather(1, indices), exact, floor=floor)
    assert_no_worse(d_W_dec, plain, dense.t() @ rows.double(), floor=floor)
    unused = (dense != 0).sum(0) == 0
    assert not d_weight[unused].any()
    assert not d_W_dec[unused].any()


def test_slots_without_an_activation_are_left_out():
    acts, indices = torch.tensor([[2.0, 0.0]]), torch.tensor([[1, 2]])
    rows = torch.full((1, 3), torch.inf)  # 0·inf would be NaN
    for gradient in (
        cpu.encode_backward(acts, indices, rows, 4)[0],
        cpu.decode_backward(rows, acts, indices, torch.ones(4, 3))[1],
    ):
        assert gradient.tolist() == [[0.0] * 3, [torch.inf] * 3, [0.0] * 3, [0.0] * 3]


def test_no_tokens():
    x, weight, bias = torch.zeros(0, 4), torch.ones(64, 4), torch.zeros(64)
    acts, indices = cpu.encode(x, weight, bias, 3)
    assert acts.shape == indices.shape == (0, 3)
    assert cpu.decode(acts, indices, weight).shape == (0, 4)
    d_acts, d_W_dec = cpu.decode_backward(x, acts, indices, weight)
    assert d_acts.shape == (0, 3)
    assert d_W_dec.shape == (64, 4)
    assert not d_W_dec.any()


@pytest.mark.parametrize("screen", SCREENS)
def test_two_runs_are_bit_identical(screen):
    inputs = make_inputs(200, 64, 2000, seed=8)

    def run() -> list[Tensor]:
        acts, indices = cpu.encode(inputs.x, inputs.weight, inputs.bias, 12, screen=screen)
        out = cpu.decode(acts, indices, inputs.W_dec, inputs.b_dec)
        return [
            acts, indices, out,
            *cpu.encode_backward(acts, indices, inputs.x, 2000),
            *cpu.decode_backward(out, acts, indices, inputs.W_dec),
        ]  # fmt: skip

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---- the public functions over them


def test_gradcheck():
    gen = torch.Generator().manual_seed(9)
    args = [
        torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True)
        for s in ((5, 4), (9, 4), (9,), (9, 4), (4,))
    ]

    def run(x, weight, bias, W_dec, b_dec):
        out = topk_encode(x, weight, bias, 3, b_dec=b_dec, implementation="cpu")
        return sparse_decode(out.top_acts, out.top_indices, W_dec, b_dec, implementation="cpu")

    assert torch.autograd.gradcheck(run, args)


def test_gradients_equal_the_references():
    inputs = make_inputs(50, 24, 333, seed=10)

    def gradients(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        x, weight, bias, W_dec, b_dec = leaves
        out = topk_encode(x, weight, bias, 7, b_dec=b_dec, implementation=implementation)
        sparse_decode(
            out.top_acts, out.top_indices, W_dec, b_dec, implementation=implementation
        ).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    exact = gradients("reference", torch.float64)
    for ours, theirs, true in zip(
        gradients("cpu", torch.float32), gradients("reference", torch.float32), exact, strict=True
    ):
        assert_no_worse(ours, theirs, true, floor=50 * 2.0**-24)  # floor: 50 tokens summed in another order


def test_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import fastsae_kernels.cpu, fastsae_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)
