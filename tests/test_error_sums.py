"""Sums of reconstruction errors: equal to a direct computation in float64, whatever the batches."""

import math

import pytest
import torch

from fastsae import FastSae, SaeConfig, error_sums
from fastsae.error_sums import ErrorSums


@pytest.fixture
def coder() -> FastSae:
    torch.manual_seed(0)
    return FastSae(5, SaeConfig(num_latents=16, k=3))


def direct(y, out, kept):
    """(fvu, l0) of the tokens that count, float64."""
    exact, active = y[kept].double(), out.latent_acts[kept] > 0
    error = (y[kept].double() - out.sae_out[kept].double()).square().sum()
    variance = (exact - exact.mean(0)).square().sum()
    return (error / variance).item(), active.sum().item() / len(exact)


@pytest.mark.parametrize("numbers", [1, 40, 2**18])
def test_totals_use_the_mean_of_all_tokens(coder, numbers, monkeypatch):
    monkeypatch.setattr(error_sums, "CHUNK", numbers)
    y = torch.randn(6, 9, 5) + 100 * torch.arange(6)[:, None, None]  # batches' means differ a lot
    kept = torch.rand(6, 9) < 0.7
    kept[0] = False  # the first batch has no token that counts
    sums, whole = ErrorSums(), coder(y)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        sums.add(y[part], coder(y[part]), kept[part])
    fvu, l0 = direct(y, whole, kept)
    assert sums.totals() == pytest.approx({"fvu": fvu, "l0": l0}, rel=1e-6)
    mean = y[kept].double().mean(0)
    known = ErrorSums(mean)
    known.add(y, whole, kept)
    errors, squares, active, tokens = known.by_sequence()
    assert tokens.tolist() == kept.sum(1).tolist()
    assert active.tolist() == ((whole.latent_acts > 0).sum(-1) * kept).sum(1).tolist()
    centred = (y.double() - mean).square().sum(-1)
    torch.testing.assert_close(squares, torch.where(kept, centred, 0).sum(1), rtol=1e-12, atol=0)
    exact = (y.double() - whole.sae_out.double()).square().sum(-1)
    torch.testing.assert_close(errors, torch.where(kept, exact, 0).sum(1), rtol=1e-12, atol=0)
    assert known.totals() == pytest.approx(sums.totals(), rel=1e-5)


def test_a_large_mean_costs_no_digits(coder):
    y = torch.randn(1, 200, 5) + 1e5  # Σy² - (Σy)²/n in float64 would keep six digits
    sums, out = ErrorSums(), coder(y)
    for part in (slice(0, 50), slice(50, 200)):
        sums.add(y[:, part], coder(y[:, part]))
    assert sums.totals()["fvu"] == pytest.approx(direct(y, out, torch.ones(1, 200, dtype=torch.bool))[0], rel=1e-7)


def test_without_tokens_nothing_is_claimed(coder):
    sums = ErrorSums()
    assert all(map(math.isnan, sums.totals().values()))
    y = torch.randn(2, 3, 5)
    sums.add(y, coder(y), torch.zeros(2, 3, dtype=torch.bool))
    assert all(map(math.isnan, sums.totals().values()))
