"""Inputs and judgements for testing kernels, usable by anyone on their own GPU.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """A coder and a batch for it."""

    x: Tensor  # [N, D]
    weight: Tensor  # [L, D]
    bias: Tensor  # [L]
    W_dec: Tensor  # [L, D], unit rows
    b_dec: Tensor  # [D]


def make_inputs(
    N: int, D: int, L: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Gaussian tokens with a few strong directions, so that latents fire unevenly as in a trained coder."""
    gen = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(L, D, generator=gen, dtype=torch.float64), dim=1)
    b_dec = torch.randn(D, generator=gen, dtype=torch.float64)
    popular = (torch.rand(N, 4, generator=gen, dtype=torch.float64) ** 3 * L).long()  # low indices fire more
    x = W_dec[popular].sum(1) * 2 + torch.randn(N, D, generator=gen, dtype=torch.float64) + b_dec
    weight = W_dec + 0.1 * torch.randn(L, D, generator=gen, dtype=torch.float64) / D**0.5
    bias = 0.1 * torch.randn(L, generator=gen, dtype=torch.float64)
    return Inputs(*(t.to(device=device, dtype=dtype) for t in (x, weight, bias, W_dec, b_dec)))


def assert_no_worse(actual: Tensor, torch_result: Tensor, truth: Tensor, *, floor: float) -> None:
    """Fail unless ``actual`` is as near to ``truth`` (float64) as torch is at the same dtype, plus a floor.

    Errors are the largest absolute difference over the largest absolute value of ``truth``; ``floor``, on
    that scale, is what a different but equally good order of summation may cost: state why you chose it.
    """
    scale = truth.abs().max().clamp_min(1e-30)
    error = ((actual.double() - truth).abs().max() / scale).item()
    torch_error = ((torch_result.double() - truth).abs().max() / scale).item()
    if not error <= torch_error + floor:  # also catches NaN
        raise AssertionError(f"error {error:.3e} exceeds torch's {torch_error:.3e} + floor {floor:.1e}")
