"""Which optimizer trains coders, and by which learning-rate rules."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig
from .errors import ConfigError
from .muon import LR as MUON_LR
from .muon import MuonAndAdam
from .row_optimizer import RULES, RowOptimizer, on_sphere
from .sae import FastSae

BASE_RATES = {"adam": 2e-4, "adam8bit": 2e-4, "bnb_adam8bit": 2e-4, "signum": 5e-3}
"""sparsify's learning rates at 2**14 latents; they fall with the root of the number of latents."""


def default_lr(optimizer: str, num_latents: int) -> float:
    """sparsify's rule: the base rate / sqrt(latents / 2**14), for muon a constant."""
    if optimizer == "muon":
        return MUON_LR
    return BASE_RATES[optimizer] / (num_latents / 2**14) ** 0.5


def make_optimizer(cfg: TrainConfig, coders: Iterable[FastSae], low_dtype: torch.dtype | None = None) -> Optimizer:
    """One optimizer over all coders, with a learning rate for each (muon: one for all).

    ``low_dtype``: the precision that the coders compute in, if it is narrower than their weights'; the matrices
    are then also kept in it. Raises :class:`ConfigError` where bitsandbytes is asked for and missing, or a newer torch.
    """
    coders = list(coders)
    if cfg.optimizer == "muon":
        return MuonAndAdam(coders, cfg.lr or MUON_LR)
    rates = [cfg.lr or default_lr(cfg.optimizer, coder.all_latents) for coder in coders]
    if cfg.optimizer in RULES:
        return RowOptimizer(coders, rates, RULES[cfg.optimizer], low_dtype)
    groups = [{"params": list(coder.parameters()), "lr": lr} for coder, lr in zip(coders, rates, strict=True)]
    return _bitsandbytes_adam(groups)


def _bitsandbytes_adam(groups: list[dict]) -> Optimizer:
    try:
        from bitsandbytes.optim.adam import Adam8bit
    except ImportError:
        raise ConfigError(
            "optimizer: expected the package bitsandbytes for 'bnb_adam8bit', it is not installed; "
            "pip install bitsandbytes, or use 'adam8bit', which needs no package"
        ) from None
    if not all(p.is_cuda for group in groups for p in group["params"]):
        raise ConfigError(
            "optimizer: expected coders on a GPU for 'bnb_adam8bit', got them elsewhere; "
            "use 'adam8bit', which runs everywhere"
        )
    return Adam8bit(groups)


def warmup_steps(cfg: TrainConfig, total_steps: int) -> int:
    """The warm-up asked for, but at most a tenth of the run, so that short runs reach their learning rate."""
    return min(cfg.lr_warmup_steps, total_steps // 10)


def make_schedule(cfg: TrainConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Warm-up and decay, or a constant rate for signum, whose averaging takes a schedule's place.

    muon's matrices have no warm-up, as in sparsify: its updates are as large from the first step on.
    """
    if cfg.optimizer == "signum":
        return LambdaLR(optimizer, lambda _step: 1.0)
    warmup = warmup_steps(cfg, total_steps)
    return linear_schedule(optimizer, [0, warmup] if cfg.optimizer == "muon" else warmup, total_steps)


def linear_schedule(optimizer: Optimizer, warmup: int | list[int], total_steps: int) -> LambdaLR:
    """Linear warm-up over ``warmup`` optimizer steps, then linear decay that reaches 0 right after the last.

    With a list each parameter group has its own.
    """

    def factor(warmup: int, step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    return LambdaLR(
        optimizer, [partial(factor, w) for w in warmup] if isinstance(warmup, list) else partial(factor, warmup)
    )


def apply_gradients(optimizer: Optimizer, coders: Iterable[FastSae], max_grad_norm: float | None = None) -> None:
    """One optimizer step on the gradients that are there; decoders kept at unit norm stay on the sphere, exactly.

    ``max_grad_norm``: each coder's gradient is scaled down to this norm first, measured on the sphere.
    """
    coders = list(coders)
    spheres = [coder for coder in coders if on_sphere(coder)]
    if max_grad_norm is not None or not isinstance(optimizer, RowOptimizer):  # which projects for itself
        for coder in spheres:
            coder.remove_gradient_parallel_to_decoder_directions()
    if max_grad_norm is not None:
        for coder in coders:  # each by itself: its steps do not depend on what is trained beside it
            _clip_gradient(coder, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # the next step's sums start in the same memory
    for coder in spheres if not isinstance(optimizer, RowOptimizer) else ():
        coder.set_decoder_norm_to_unit_norm()


def _clip_gradient(coder: FastSae, max_norm: float) -> None:
    parameters = list(coder.parameters())
    if coder.peers is None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    whole = {id(p) for p in (coder.b_dec, coder.W_skip)}  # on every rank, and the same
    rows = [p.grad for p in parameters if id(p) not in whole and p.grad is not None]
    square = coder.over_slices(torch.nn.utils.get_total_norm(rows).square())
    small = torch.nn.utils.get_total_norm([p.grad for p in parameters if id(p) in whole and p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, (square + small.square()).sqrt())


def active_latents(cfg: TrainConfig, coder: FastSae, step: int) -> int:
    """k in optimizer step ``step`` (from 0): linear from min(latents, 10 D) to the coder's, as sparsify decays it."""
    first, last = min(coder.all_latents, 10 * coder.d_in), coder.cfg.k
    if step >= cfg.k_decay_steps or first <= last or coder.cfg.activation == "groupmax":
        return last
    return round(first + (last - first) * step / cfg.k_decay_steps)


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The current learning rate of every parameter group."""
    return [float(torch.as_tensor(group["lr"])) for group in optimizer.param_groups]
