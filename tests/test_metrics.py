"""Metrics: sums that equal a direct computation, whatever the batches."""

import time

import pytest
import torch

from fastsae import FastSae, SaeConfig, TrainConfig
from fastsae.deferred import Stopwatch
from fastsae.errors import NonFiniteError
from fastsae.joint import StepLosses, joint_step
from fastsae.metrics import TrainingMetrics


@pytest.fixture
def coder() -> FastSae:
    torch.manual_seed(0)
    return FastSae(5, SaeConfig(num_latents=16, k=3))


def step_losses(coder: FastSae, y: torch.Tensor, variance: torch.Tensor | None = None) -> StepLosses:
    if variance is None:
        variance = (y - y.mean(0)).pow(2).sum()
    return joint_step(coder, y, y, variance, TrainConfig(), dead=None, share=1.0, optimizer=None)


def test_training_means_over_batches_and_chunks(coder):
    metrics = TrainingMetrics("h.0", coder)
    a, b = torch.randn(8, 5), torch.randn(8, 5)
    metrics.add(step_losses(coder, a), 1.0)
    variance = (b - b.mean(0)).pow(2).sum()
    for part in b.chunk(2):
        metrics.add(step_losses(coder, part, variance), 0.5)
    assert metrics.read(10)["fvu"] == pytest.approx((coder(a).fvu + coder(b).fvu).item() / 2, rel=1e-5)
    metrics.add(step_losses(coder, a), 1.0)
    assert metrics.read(10)["fvu"] == pytest.approx(coder(a).fvu.item(), rel=1e-5)  # starts anew after a reading


def test_silent_latents_are_counted_in_tokens(coder):
    metrics = TrainingMetrics("h.0", coder)
    with torch.no_grad():
        coder.encoder.weight.zero_()
        coder.encoder.bias.fill_(-1.0)
        coder.encoder.bias[[3, 7]] = 1.0  # k = 3: a third latent is selected with activation 0
    metrics.add(step_losses(coder, torch.randn(4, 5)), 1.0)
    metrics.end_step(4)
    assert metrics.tokens_since_fired.tolist() == [0 if i in (3, 7) else 4 for i in range(16)]
    metrics.end_step(10, threshold=13)
    dead = metrics.dead_ids()
    assert dead is not None
    assert dead.tolist() == [i for i in range(16) if i not in (3, 7)]
    assert metrics.tokens_since_fired.tolist() == [10 if i in (3, 7) else 14 for i in range(16)]
    assert metrics.dead(10).sum() == 14
    assert metrics.read(10)["dead_pct"] == pytest.approx(100 * 14 / 16)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((4, 5), float("nan")), "h.0, step 3: expected finite activations that vary"),
        (torch.full((4, 5), float("inf")), "h.0, step 3: expected finite activations that vary"),
        (torch.ones(4, 5), "h.0, step 3: expected finite activations that vary"),
    ],
)
def test_unusable_activations_are_named_with_their_first_step(coder, x, message):
    metrics = TrainingMetrics("h.0", coder)
    for step, y in enumerate([torch.randn(4, 5), torch.randn(4, 5), x, x], 1):
        metrics.add(step_losses(coder, y), 1.0)
        metrics.watch(step, (y - y.mean(0)).pow(2).sum())
    with pytest.raises(NonFiniteError, match=message):
        metrics.read(10)


def test_divergence_is_told_from_bad_activations(coder):
    metrics = TrainingMetrics("h.0", coder)
    with torch.no_grad():
        coder.b_dec.fill_(float("nan"))
    y = torch.randn(4, 5)
    metrics.add(step_losses(coder, y), 1.0)
    metrics.watch(8, (y - y.mean(0)).pow(2).sum())
    with pytest.raises(NonFiniteError, match="h.0, step 8: expected a finite loss.*Lower --lr"):
        metrics.check()


def test_stopwatch_sums():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            time.sleep(0.01)
    assert 0.02 <= watch.read() < 0.5
