"""An optimizer's step of a row, held in registers: projection, moments, norm 1, narrow copy in one pass.

Shapes: L rows, D columns, Q = ceil(D / 256) blocks of a row that share a scale (8-bit states).

`update_row` is the arithmetic of :mod:`.rules`, for a kernel that has a row and its gradient: `_row_update_kernel`
here, which reads gradients from memory, and :mod:`.latent_step`, which has just summed them. Bytes per
parameter beyond the gradient's: Adam 24, Adam8bit 12, Signum 16, and the narrow copy's.
"""
# pyright: basic

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import gpu_family
from .rules import QUANT_BLOCK, Adam, Rows, Rule, Signum
from .sparse_configs import update_warps

MAX_WIDTH = 8192
"""Wider rows do not fit into registers: :mod:`.update` takes them block by block in plain torch."""

_ADAM = tl.constexpr(0)
_ADAM8BIT = tl.constexpr(1)
_SIGNUM = tl.constexpr(2)
_QUANT_BLOCK = tl.constexpr(QUANT_BLOCK)
CODES = {"adam": 0, "adam8bit": 1, "signum": 2}


@triton.jit
def _block_scale(size, BLOCK_D: tl.constexpr, QUANT: tl.constexpr):
    """The largest of each block of QUANT columns; [BLOCK_D / QUANT]."""
    return tl.max(tl.reshape(size, (BLOCK_D // QUANT, QUANT)), axis=1)


@triton.jit
def _spread(scale, BLOCK_D: tl.constexpr, QUANT: tl.constexpr):
    """[BLOCK_D / QUANT] -> [BLOCK_D]: each column's scale."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK_D // QUANT, QUANT)), (BLOCK_D,))


@triton.jit
def update_row(
    w, grad, row, offs_d, mask_d,  # float32 [BLOCK_D], [BLOCK_D]; int64 []
    first_ptr, second_ptr,  # [L, D]: mean and squares' mean, or z and None
    first_scale_ptr, second_scale_ptr,  # [L, Q] of 8-bit states, else None
    low_ptr,  # [L, D] or None
    lr, beta1, beta2, eps, correction1, correction2,
    D: tl.constexpr, RULE: tl.constexpr, UNIT_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The new row; states and narrow copy are written. Columns past D must come as 0 and stay 0."""
    QUANT: tl.constexpr = min(_QUANT_BLOCK, BLOCK_D)
    offs = row * D + offs_d
    if UNIT_ROWS:
        grad -= tl.sum(grad * w, axis=0) * w
    first = tl.load(first_ptr + offs, mask=mask_d, other=0, eviction_policy="evict_first").to(tl.float32)
    if RULE == _SIGNUM:  # beta1 is the momentum, correction1 is 1 / step
        average = w + (first - w) * (1 - 1 / beta1)
        first -= lr * tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, grad))
        average += (first - average) * correction1
        w = average + (first - average) * (1 - beta1)
        tl.store(first_ptr + offs, first, mask=mask_d, eviction_policy="evict_first")
    else:
        second = tl.load(second_ptr + offs, mask=mask_d, other=0, eviction_policy="evict_first").to(tl.float32)
        if RULE == _ADAM8BIT:
            num_scales: tl.constexpr = (D + QUANT - 1) // QUANT
            offs_q = tl.arange(0, BLOCK_D // QUANT)
            offs_scale = row * num_scales + offs_q
            mask_q = offs_q < num_scales
            first_scale = tl.load(first_scale_ptr + offs_scale, mask=mask_q, other=0.0)
            second_scale = tl.load(second_scale_ptr + offs_scale, mask=mask_q, other=0.0)
            share = first / 127
            first = share * tl.abs(share) * _spread(first_scale, BLOCK_D, QUANT)
            root = second / 255 * _spread(second_scale, BLOCK_D, QUANT)
            second = root * root
        first += (grad - first) * (1 - beta1)
        second = second * beta2 + grad * grad * (1 - beta2)
        root = tl.sqrt(second)
        w -= lr / correction1 * first / (root / correction2 + eps)
        if RULE == _ADAM8BIT:
            first_scale = _block_scale(tl.abs(first), BLOCK_D, QUANT)
            second_scale = _block_scale(root, BLOCK_D, QUANT)
            tl.store(first_scale_ptr + offs_scale, first_scale, mask=mask_q)
            tl.store(second_scale_ptr + offs_scale, second_scale, mask=mask_q)
            share = first / tl.maximum(_spread(first_scale, BLOCK_D, QUANT), 1.1754943508222875e-38)
            code = tl.floor(tl.sqrt(tl.abs(share)) * 127 + 0.5)
            first = tl.where(share < 0, -code, code)
            share = root / tl.maximum(_spread(second_scale, BLOCK_D, QUANT), 1.1754943508222875e-38)
            second = tl.minimum(tl.maximum(tl.floor(share * 255 + 0.5), 1.0), 255.0)
        first, second = first.to(first_ptr.dtype.element_ty), second.to(second_ptr.dtype.element_ty)
        tl.store(first_ptr + offs, first, mask=mask_d, eviction_policy="evict_first")
        tl.store(second_ptr + offs, second, mask=mask_d, eviction_policy="evict_first")
    if UNIT_ROWS:
        w = w / tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1.1754943508222875e-38)
    if low_ptr is not None:
        tl.store(low_ptr + offs, w.to(low_ptr.dtype.element_ty), mask=mask_d)
    return w


@triton.jit
def _row_update_kernel(
    weight_ptr, grad_ptr,  # [L, D], [L, D]
    first_ptr, second_ptr, first_scale_ptr, second_scale_ptr, low_ptr,
    lr, beta1, beta2, eps, correction1, correction2,
    D: tl.constexpr, RULE: tl.constexpr, UNIT_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    w = tl.load(weight_ptr + row * D + offs_d, mask=mask_d, other=0.0, eviction_policy="evict_first")
    grad = tl.load(grad_ptr + row * D + offs_d, mask=mask_d, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w = update_row(
        w, grad, row, offs_d, mask_d, first_ptr, second_ptr, first_scale_ptr, second_scale_ptr, low_ptr,
        lr, beta1, beta2, eps, correction1, correction2, D, RULE, UNIT_ROWS, BLOCK_D,
    )  # fmt: skip
    tl.store(weight_ptr + row * D + offs_d, w, mask=mask_d, eviction_policy="evict_first")


def fits(rule: Rule, matrix: Rows) -> bool:
    """Whether the kernel can take the step: float32 rows that fit into registers, and a rule it knows."""
    weight = matrix.weight
    return rule.name in CODES and weight.dtype == torch.float32 and weight.shape[1] <= MAX_WIDTH


def update(rule: Rule, matrix: Rows, grad: Tensor, *, lr: float, step: int) -> None:
    """Step number ``step`` (from 1) of ``matrix`` [L, D] by ``grad`` [L, D]; ``grad`` is read only."""
    L, D = matrix.weight.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    warps = update_warps(BLOCK_D, gpu_family(grad.device))
    with torch.cuda.device_of(matrix.weight):
        _row_update_kernel[(L,)](
            matrix.weight, grad.contiguous(), *state_pointers(matrix), *scalars(rule, lr, step),
            D=D, RULE=CODES[rule.name], UNIT_ROWS=matrix.unit_rows, BLOCK_D=BLOCK_D, num_warps=warps,
        )  # fmt: skip


def state_pointers(matrix: Rows) -> tuple[Tensor | None, ...]:
    """first, second, their scales, and the narrow copy, as `update_row` takes them."""
    state = matrix.state
    if "z" in state:
        return state["z"], None, None, None, matrix.low
    scales = state.get("exp_avg_scale"), state.get("exp_avg_sq_scale")
    return state["exp_avg"], state["exp_avg_sq"], *scales, matrix.low


def scalars(rule: Any, lr: float, step: int) -> tuple[float, ...]:
    """lr, beta1, beta2, eps, correction1, correction2, as `update_row` takes them."""
    if isinstance(rule, Signum):
        return lr, rule.momentum, 0.0, 0.0, 1.0 / step, 0.0
    assert isinstance(rule, Adam)
    return lr, rule.beta1, rule.beta2, rule.eps, 1 - rule.beta1**step, (1 - rule.beta2**step) ** 0.5
