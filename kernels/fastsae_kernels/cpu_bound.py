"""How far a bfloat16 screening score can lie below what it stands for, proved.

Shapes: N tokens, D width, L latents; n rows of a chunk.

Bound. Write x̂, ŵ, b̂ for the operands rounded to bfloat16, δ for the rounding errors (known exactly: they
are computed, not bounded), u = 2⁻⁸ for bfloat16's unit roundoff and t for the largest screening score that was
not scored again. A float32 sum of D + 1 terms, in any order, is off by at most (D + 8)·2⁻²⁴·(‖x‖‖w‖ + |b|).
By Cauchy-Schwarz

    |x̂·ŵ − x·w| = |δx·w + x̂·δw| <= ‖δx‖‖w‖ + (‖x‖ + ‖δx‖)‖δw‖ .

An excluded latent's stored screening score is <= t. At most two roundings to bfloat16 made it, that of the
product p and that of p + b̂, so it stood for at most t + u|t| + u(|t|(1 + u) + |b̂|). Its float32 score,
whatever the order of summation, is therefore at most

    U = t + u(2.02|t| + max|b̂|) + max|δb| + max_l(‖δx‖‖w_l‖ + (‖x‖ + ‖δx‖)‖δw_l‖) + (D + 8)·2⁻²²·(‖x‖‖w‖ + max|b|) ,

where the last term pays for both float32 sums twice over, and the maximum is taken factor by factor. Norms are
raised by D·2⁻²³ (their own rounding) and √D·2⁻⁶³ (squares that underflow, subnormal inputs flushed to
zero). A token is certified if its k-th activation exceeds U; where that activation is 0, U < 0 says that every
excluded one is 0 too. All other tokens, and those whose bound is not finite, are encoded in float32 in full.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-8
ROUNDED = 2**20  # numbers rounded at a time: their float32 differences stay near the cores
LARGEST = 1e38  # no partial sum below it can overflow


class Rounded(NamedTuple):
    """A float32 coder in bfloat16, and how far off it can be."""

    weight: Tensor  # [L, D] bfloat16
    bias: Tensor  # [L] bfloat16
    norm: Tensor  # max ‖w_l‖, float64 like all below
    error: Tensor  # max ‖δw_l‖
    bias_size: Tensor  # max |b|, |b̂|
    bias_error: Tensor  # max |δb|


def round_coder(weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Rounded:
    """Round ``weight`` [L, D] (into ``out``) and ``bias`` [L] to bfloat16, measuring the errors made."""
    rounded = torch.empty_like(weight, dtype=torch.bfloat16) if out is None else out
    D = weight.shape[1]
    step = max(1, ROUNDED // max(1, D))
    norms, errors, scratch = [], [], weight.new_empty(min(step, len(weight)), D)
    for part, out in zip(weight.split(step), rounded.split(step), strict=True):
        out.copy_(part)
        norms.append(norm(part).amax())
        errors.append(norm(scratch[: len(part)].copy_(out).sub_(part)).amax())  # the difference of the two is exact
    low = bias.to(torch.bfloat16)
    size = torch.maximum(bias.abs(), low.abs()).masked_fill(bias.isinf(), 0.0)
    error = (bias - low).masked_fill(bias == low, 0.0)  # ±inf are exact
    return Rounded(
        rounded, low, torch.stack(norms).amax(), torch.stack(errors).amax(),
        size.double().amax(), error.abs().double().amax(),
    )  # fmt: skip


def norm(rows: Tensor) -> Tensor:
    """An upper bound of each row's Euclidean norm, float64 [n]."""
    D = rows.shape[1]
    return torch.linalg.vector_norm(rows, dim=1).double() * (1 + D * 2.0**-23) + D**0.5 * 2.0**-63


def excluded_bound(
    weakest: Tensor, x: Tensor, x_low: Tensor, coder: Rounded, norms: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """U above: [n] float64, infinite or NaN where nothing can be promised. ``weakest`` is t, [n].

    ``norms``: of x and of x - x_low, where the caller has them.
    """
    t, (size, error) = weakest.double(), norms or (norm(x), norm(x - x_low))
    scale = size * coder.norm + coder.bias_size
    stored = UNIT_ROUNDOFF * (2.02 * t.abs() + coder.bias_size) + coder.bias_error
    rounding = error * coder.norm + (size + error) * coder.error
    summation = (x.shape[1] + 8) * 2.0**-22 * scale
    return (t + stored + rounding + summation).masked_fill(~(scale < LARGEST), torch.inf)
