"""The optimizer in registers against its plain twin: alone, and behind the latent-major backward."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels import row_update
from fastsae_kernels.rules import Adam, Adam8bit, Rows, Signum, update_rows
from fastsae_kernels.step import coder_step
from fastsae_kernels.step_parts import GradSink, RowStep
from test_step import make_case, to

RULES = [Adam(), Adam8bit(), Signum()]


def make_rows(L: int, D: int, rule, device: str, *, unit_rows: bool, low: bool, seed: int = 0) -> Rows:
    """A matrix some steps into its training."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(L, D, generator=gen)
    if unit_rows:
        weight = torch.nn.functional.normalize(weight, dim=1)
    state = rule.new_state(weight)
    for step in (1, 2):
        update_rows(rule, Rows(weight, state, unit_rows), torch.randn(L, D, generator=gen), lr=0.01, step=step)
    state = {name: tensor.to(device) for name, tensor in state.items()}
    weight = weight.to(device)
    return Rows(weight, state, unit_rows, weight.bfloat16() if low else None)


def copy(rows: Rows) -> Rows:
    state = {name: tensor.clone() for name, tensor in rows.state.items()}
    return Rows(rows.weight.clone(), state, rows.unit_rows, None if rows.low is None else rows.low.clone())


def assert_same(got: Rows, want: Rows) -> None:
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-5, atol=2e-6)
    for name, tensor in want.state.items():
        if tensor.dtype in (torch.int8, torch.uint8):  # halves may round either way
            difference = (got.state[name].int() - tensor.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.01
        else:
            torch.testing.assert_close(got.state[name], tensor, rtol=1e-4, atol=1e-7)
    if want.low is not None:
        assert got.low is not None
        torch.testing.assert_close(got.low.float(), got.weight, rtol=2**-7, atol=0)  # the interpreter truncates


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(("L", "D"), [(1, 1), (3, 7), (5, 255), (2, 300), (3, 1024)])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_separate_pass_is_the_plain_update(rule, L, D, unit_rows, device):
    rows = make_rows(L, D, rule, device, unit_rows=unit_rows, low=True)
    want, grad = copy(rows), torch.randn(L, D, generator=torch.Generator().manual_seed(1)).to(device)
    grad[0] = 0.0
    update_rows(rule, want._replace(low=None), grad.clone(), lr=0.01, step=3)
    row_update.update(rule, rows, grad, lr=0.01, step=3)
    assert_same(rows, want)


VARIANTS = {"plain": {}, "all": {"multi": True, "dead": 5}, "transcoder": {"centered": False}}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_behind_the_backward_it_takes_the_same_step(rule, variant, device):
    case = to(make_case((21, 19, 37, 5), **VARIANTS[variant]), torch.float32, device)
    sphere = case.coder.centered
    encoder = make_rows(37, 19, rule, device, unit_rows=False, low=False)
    decoder = make_rows(37, 19, rule, device, unit_rows=sphere, low=False, seed=1)
    case = case._replace(coder=case.coder._replace(weight=encoder.weight, W_dec=decoder.weight))
    dense = GradSink(torch.zeros_like(encoder.weight), torch.zeros_like(decoder.weight))
    want = coder_step(case.x, case.y, case.coder, case.loss, dense, k=case.k)
    want_rows = copy(encoder), copy(decoder)
    for matrix, grad in zip(want_rows, (dense.dW_enc, dense.dW_dec), strict=True):
        update_rows(rule, matrix, grad, lr=0.01, step=3)
    got = coder_step(case.x, case.y, case.coder, case.loss, RowStep(rule, 0.01, 3, encoder, decoder), k=case.k)
    for name in ("fvu", "auxk", "multi_fvu", "top_acts", "d_bias", "d_b_dec"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    if rule.name == "signum":  # a sign flips where a gradient is rounding noise
        same = (encoder.weight - want_rows[0].weight).abs() < 1e-5
        assert same.float().mean() > 0.99
    else:
        assert_same(encoder, want_rows[0])
        assert_same(decoder, want_rows[1])


def test_hot_latents_and_partial_blocks_of_latents(device, monkeypatch):
    monkeypatch.setattr("fastsae_kernels.by_latent.SPLIT", 4)
    case = to(make_case((33, 16, 21, 7)), torch.float32, device)
    rule = Adam()
    encoder = Rows(case.coder.weight, rule.new_state(case.coder.weight))
    decoder = Rows(case.coder.W_dec, rule.new_state(case.coder.W_dec), True)
    want = copy(encoder), copy(decoder)
    dense = GradSink(torch.zeros_like(encoder.weight), torch.zeros_like(decoder.weight))
    coder_step(case.x, case.y, case.coder, case.loss, dense, k=case.k)
    assert 33 * 7 / 21 > 2 * 4  # a latent has several chunks on average
    for matrix, grad in zip(want, (dense.dW_enc, dense.dW_dec), strict=True):
        update_rows(rule, matrix, grad, lr=0.01, step=1)
    coder_step(case.x, case.y, case.coder, case.loss, RowStep(rule, 0.01, 1, encoder, decoder), k=case.k)
    assert_same(encoder, want[0])
    assert_same(decoder, want[1])


def test_what_does_not_fit_is_said():
    wide = Rows(torch.zeros(1, row_update.MAX_WIDTH + 1), {})
    assert not row_update.fits(Adam(), wide)
    assert not row_update.fits(Adam(), Rows(torch.zeros(1, 4, dtype=torch.float64), {}))
    assert row_update.fits(Adam(), Rows(torch.zeros(1, 4), {}))
