"""The optimizer step: learning-rate rules, a schedule that ends at the last step, decoders on the sphere."""

from collections.abc import Callable

import pytest
import torch

from fastsae import FastSae, SaeConfig, TrainConfig, TranscoderConfig
from fastsae.optim import apply_gradients, default_lr, learning_rates, linear_schedule, make_optimizer, warmup_steps


def coders(*latents: int, cfg: Callable[..., SaeConfig] = SaeConfig) -> list[FastSae]:
    torch.manual_seed(0)
    return [FastSae(5, cfg(num_latents=n, k=2)) for n in latents]


def test_learning_rate_rule():
    assert default_lr("adam", 2**14) == pytest.approx(2e-4)
    assert default_lr("adam", 2**16) == pytest.approx(1e-4)
    optimizer = make_optimizer(TrainConfig(), coders(16, 64))
    assert learning_rates(optimizer) == pytest.approx([2e-4 * 32] * 2 + [2e-4 * 16] * 2)
    assert learning_rates(make_optimizer(TrainConfig(lr=0.5), coders(16, 64))) == [0.5] * 4


def test_schedule_warms_up_and_ends_at_the_last_step():
    (coder,) = coders(8)
    optimizer = make_optimizer(TrainConfig(lr=1.0), [coder])
    schedule = linear_schedule(optimizer, warmup=4, total_steps=10)
    used = []
    for _ in range(10):
        used.append(learning_rates(optimizer)[0])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rates(optimizer) == [0.0, 0.0]


def test_warm_up_is_at_most_a_tenth_of_the_run():
    assert warmup_steps(TrainConfig(), 100_000) == 1000
    assert warmup_steps(TrainConfig(), 50) == 5
    assert warmup_steps(TrainConfig(), 1) == 0


def test_a_step_is_adams_on_the_projected_gradient_and_keeps_unit_norm():
    (coder,) = coders(8)
    assert coder.W_dec is not None
    twin = coder.W_dec.detach().clone()
    optimizer = make_optimizer(TrainConfig(lr=0.1), [coder])
    gradient = torch.randn_like(twin)
    for parameter in coder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    coder.W_dec.grad = gradient.clone()
    apply_gradients(optimizer, [coder])
    projected = gradient - (gradient * twin).sum(1, keepdim=True) * twin
    moved = twin - 0.1 * projected / (projected.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(coder.W_dec.detach(), moved / moved.norm(dim=1, keepdim=True))
    assert not any(parameter.grad.any() for parameter in coder.parameters())


def test_transcoders_are_not_normalised():
    (coder,) = coders(8, cfg=TranscoderConfig)
    assert coder.W_dec is not None
    optimizer = make_optimizer(TrainConfig(lr=0.1), [coder])
    for parameter in coder.parameters():
        parameter.grad = torch.ones_like(parameter)
    apply_gradients(optimizer, [coder])
    torch.testing.assert_close(coder.W_dec.detach(), torch.full((8, 5), -0.1))
