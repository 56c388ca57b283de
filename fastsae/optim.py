"""Optimizers and learning-rate rules for coders."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig
from .sae import FastSae


def adam_lr(num_latents: int) -> float:
    """sparsify's rule: 2e-4 / sqrt(latents / 2**14)."""
    return 2e-4 / (num_latents / 2**14) ** 0.5


def make_optimizer(cfg: TrainConfig, coders: Iterable[FastSae]) -> Optimizer:
    """One optimizer over all coders, a parameter group (with its own learning rate) for each."""
    groups = [{"params": list(coder.parameters()), "lr": cfg.lr or adam_lr(coder.num_latents)} for coder in coders]
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return Adam(groups, fused=fused)


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """The warm-up asked for, but at most a tenth of the run, so that short runs reach their learning rate."""
    return min(cfg.lr_warmup_steps, total_steps // 10)


def linear_schedule(optimizer: Optimizer, warmup: int, total_steps: int) -> LambdaLR:
    """Linear warm-up over ``warmup`` optimizer steps, then linear decay that reaches 0 right after the last."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    return LambdaLR(optimizer, factor)


def apply_gradients(optimizer: Optimizer, schedule: LambdaLR, coders: Iterable[FastSae]) -> None:
    """One optimizer step; decoders that are kept at unit norm stay on the sphere, exactly."""
    spheres = [coder for coder in coders if coder.cfg.normalize_decoder and not coder.cfg.transcode]
    for coder in spheres:
        coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    for coder in spheres:
        coder.set_decoder_norm_to_unit_norm()


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The current learning rate of every parameter group."""
    return [float(torch.as_tensor(group["lr"])) for group in optimizer.param_groups]
