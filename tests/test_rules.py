"""The optimizers' arithmetic: against torch.optim.Adam, schedulefree's wrapper, and by property."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels.rules import (
    Adam,
    Adam8bit,
    Rows,
    Signum,
    decode_mean,
    decode_square,
    encode_mean,
    encode_square,
    update_rows,
)

L, D = 13, 300


def gradients(steps: int, *shape: int, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=gen, dtype=dtype) * 10.0 ** (i % 3 - 2) for i in range(steps)]


def run(rule, weight, grads, **options):
    weight = weight.clone()
    state = rule.new_state(weight)
    for step, grad in enumerate(grads, 1):
        update_rows(rule, Rows(weight, state, **options), grad.clone(), lr=0.01, step=step)
    return weight, state


@pytest.mark.parametrize("fused", [True, False])
def test_adam_is_torchs(fused, monkeypatch):
    start, grads = torch.randn(L, D), gradients(5, L, D)
    if not fused:
        monkeypatch.delattr(torch, "_fused_adam_")
    weight, state = run(Adam(), start, grads)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01)
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight, theirs.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg"], optimizer.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_signum_is_schedulefrees_wrapper_of_sign_descent():
    schedulefree = pytest.importorskip("schedulefree", reason="comes with eai-sparsify")
    from sparsify.sign_sgd import SignSGD

    start, grads = torch.randn(L, D), gradients(6, L, D)
    weight, state = run(Signum(), start, grads)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = schedulefree.ScheduleFreeWrapper(SignSGD([theirs], lr=0.01), momentum=0.95)
    optimizer.train()
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(weight, theirs.data, rtol=1e-5, atol=1e-6)
    optimizer.eval()
    torch.testing.assert_close(Signum().averaged(weight, state["z"]), theirs.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [Adam(), Adam8bit(), Signum()], ids=lambda rule: rule.name)
def test_blocks_of_rows_equal_the_whole(rule):
    start, grads = torch.randn(L, D), gradients(4, L, D)
    whole, whole_state = run(rule, start, grads, unit_rows=True)
    weight, state = start.clone(), rule.new_state(start)
    for step, grad in enumerate(grads, 1):
        for part in (slice(5, L), slice(0, 1), slice(1, 5)):
            rows = Rows(weight, state, unit_rows=True).part(part.start, part.stop)
            update_rows(rule, rows, grad[part].clone(), lr=0.01, step=step)
    torch.testing.assert_close(weight, whole, rtol=1e-6, atol=1e-6)  # torch's vector tails round otherwise
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.float(), whole_state[name].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [Adam(), Adam8bit(), Signum()], ids=lambda rule: rule.name)
def test_unit_rows_stay_on_the_sphere_and_see_no_parallel_gradient(rule):
    torch.manual_seed(5)
    start, grads = torch.nn.functional.normalize(torch.randn(L, D), dim=1), gradients(3, L, D)
    low = torch.empty(L, D, dtype=torch.bfloat16)
    weight, _ = run(rule, start, grads, unit_rows=True, low=low)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(L), rtol=1e-6, atol=1e-6)
    assert low.equal(weight.bfloat16())
    bent, _ = run(rule, start, [grads[0] + 3 * start], unit_rows=True)  # one step: only the parallel part differs
    torch.testing.assert_close(bent, run(rule, start, [grads[0]], unit_rows=True)[0], rtol=1e-4, atol=1e-5)


def test_eight_bit_states_follow_adam():
    start, grads = torch.randn(L, D), gradients(30, L, D)
    exact, close = run(Adam(), start, grads)[0], run(Adam8bit(), start, grads)[0]
    moved = (exact - start).abs().mean()
    assert 0 < (exact - close).abs().mean() < 0.03 * moved
    assert run(Adam8bit(), start, grads)[1]["exp_avg"].dtype == torch.int8


def test_codes_are_as_near_as_their_grid_allows():
    mean = torch.randn(L, D) * torch.logspace(-8, 2, L)[:, None]
    codes, scale = encode_mean(mean)
    assert scale.shape == (L, 2)
    share = mean / scale.repeat_interleave(256, 1)[:, :D]
    error = (decode_mean(codes, scale) - mean).abs() / scale.repeat_interleave(256, 1)[:, :D]
    assert (error <= (2 * share.abs().sqrt() + 0.5 / 127) * 0.5 / 127 + 1e-6).all()  # a grid of roots
    square = mean.square()
    codes, scale = encode_square(square)
    root_error = (decode_square(codes, scale).sqrt() - mean.abs()).abs()
    assert (root_error <= scale.repeat_interleave(256, 1)[:, :D] / 255 * 1.001).all()
    assert codes.min() >= 1  # no denominator becomes 0


def test_zero_states_stay_zero():
    zeros = torch.zeros(2, D)
    assert decode_mean(*encode_mean(zeros)).equal(zeros)
    assert decode_square(*encode_square(zeros)).equal(zeros)


def test_rows_without_gradient_move_as_dense_adam_moves_them():
    start = torch.randn(L, D)
    grads = [*gradients(2, L, D), torch.zeros(L, D)]
    assert not run(Adam(), start, grads)[0].equal(run(Adam(), start, grads[:2])[0])
