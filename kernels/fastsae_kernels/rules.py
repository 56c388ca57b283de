"""The optimizers' arithmetic on rows of a matrix, in plain PyTorch: Adam, Adam with 8-bit states, Signum.

Shapes: R rows, D columns, Q = ceil(D / 256) blocks of a row.

A row is updated in one pass. Where it lives on the unit sphere (``unit_rows``) its gradient first loses the part
parallel to it, ``g - <g, w> w``, and the new row is scaled back to norm 1. A rule's state is a dict of tensors
whose first axis is the row's, so that any block of rows can be updated by itself: every row exactly once per step,
also those whose gradient is 0, as dense optimizers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

QUANT_BLOCK = 256
"""Columns that share a scale in an 8-bit state; the last block of a row may be shorter."""

State = dict[str, Tensor]


class Rule(Protocol):
    """How one step changes rows."""

    @property
    def name(self) -> str:
        """``adam``, ``adam8bit`` or ``signum``."""
        ...

    def new_state(self, weight: Tensor) -> State:
        """The state of ``weight`` before its first step."""
        ...

    def update_(self, weight: Tensor, grad: Tensor, state: State, *, lr: float, step: int) -> None:
        """Step number ``step`` (from 1) of rows ``weight`` by ``grad``, [R, D] or [R], in place."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), float32 states; the arithmetic of ``torch.optim.Adam``."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    name = "adam"

    def new_state(self, weight: Tensor) -> State:
        zeros = torch.zeros_like(weight, dtype=torch.float32)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def update_(self, weight: Tensor, grad: Tensor, state: State, *, lr: float, step: int) -> None:
        moments = state["exp_avg"], state["exp_avg_sq"]
        fused = getattr(torch, "_fused_adam_", None)  # what torch.optim.Adam(fused=True) calls
        if fused is not None and weight.device.type == "cpu" and weight.dtype == grad.dtype:
            fused(
                [weight], [grad], [moments[0]], [moments[1]], [], [torch.tensor(float(step))],
                lr=lr, beta1=self.beta1, beta2=self.beta2, weight_decay=0.0, eps=self.eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        self.change_(weight, grad, *moments, lr=lr, step=step)

    def change_(self, weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *, lr: float, step: int) -> None:
        """Update the moments and the rows: what :meth:`update_` does, with the moments at hand."""
        grad = grad.to(mean.dtype)
        mean.lerp_(grad, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        size = square.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.eps)
        weight.addcdiv_(mean, size, value=-lr / (1 - self.beta1**step))


@dataclass(frozen=True)
class Adam8bit(Adam):
    """Adam whose moments are stored in 8 bits between steps: one byte each, and a float32 scale per 256 columns.

    The mean is stored as sign and square root of its share of the block's largest; of the squares' mean the root
    is stored, rounded up to at least one 255th of the block's largest, so that no small denominator becomes 0.
    Vectors keep float32 states. Not bit-compatible with bitsandbytes, whose code is another one.
    """

    name = "adam8bit"

    def new_state(self, weight: Tensor) -> State:
        if weight.ndim == 1:
            return super().new_state(weight)
        rows, columns = weight.shape
        scale = weight.new_zeros((rows, -(-columns // QUANT_BLOCK)), dtype=torch.float32)
        codes = torch.zeros_like(weight, dtype=torch.int8)
        return {
            "exp_avg": codes,
            "exp_avg_scale": scale,
            "exp_avg_sq": torch.zeros_like(codes, dtype=torch.uint8),
            "exp_avg_sq_scale": scale.clone(),
        }

    def update_(self, weight: Tensor, grad: Tensor, state: State, *, lr: float, step: int) -> None:
        if weight.ndim == 1:
            super().update_(weight, grad, state, lr=lr, step=step)
            return
        mean = decode_mean(state["exp_avg"], state["exp_avg_scale"])
        square = decode_square(state["exp_avg_sq"], state["exp_avg_sq_scale"])
        self.change_(weight, grad, mean, square, lr=lr, step=step)
        for name, (codes, scale) in {"exp_avg": encode_mean(mean), "exp_avg_sq": encode_square(square)}.items():
            state[name].copy_(codes)
            state[f"{name}_scale"].copy_(scale)


@dataclass(frozen=True)
class Signum:
    """Sign descent with schedule-free averaging (Defazio et al. 2024, arXiv 2405.15682), as sparsify trains.

    The rows hold y, the point where gradients are taken; the state holds z. The average x, which is what to
    evaluate and save, is ``(y - (1 - momentum) z) / momentum``: see :meth:`averaged`. All steps weigh the same:
    x moves by 1/step towards z, whatever the learning rate was, as in sparsify, whose rate is constant.
    """

    momentum: float = 0.95
    name = "signum"

    def new_state(self, weight: Tensor) -> State:
        return {"z": weight.detach().clone()}

    def update_(self, weight: Tensor, grad: Tensor, state: State, *, lr: float, step: int) -> None:
        sign, z = grad.sign(), state["z"]
        weight.lerp_(z, 1 / step)  # with x written out, the new y is that of the old z, and its share of z's step
        weight.add_(sign, alpha=-lr * (1 - self.momentum + self.momentum / step))
        z.add_(sign, alpha=-lr)

    def averaged(self, weight: Tensor, z: Tensor) -> Tensor:
        """The average x of rows ``weight`` (which hold y) and their state z."""
        return torch.lerp(weight, z, 1 - 1 / self.momentum)


class Rows(NamedTuple):
    """A matrix that an optimizer updates row by row."""

    weight: Tensor  # [L, D]
    state: State
    unit_rows: bool = False
    low: Tensor | None = None  # [L, D]: a copy in a narrower dtype, kept up to date

    def part(self, begin: int, end: int) -> Rows:
        """The rows ``begin ... end - 1``: views."""
        state = {name: tensor[begin:end] for name, tensor in self.state.items()}
        low = None if self.low is None else self.low[begin:end]
        return Rows(self.weight[begin:end], state, self.unit_rows, low)


def update_rows(rule: Rule, matrix: Rows, grad: Tensor, *, lr: float, step: int) -> None:
    """One step of ``matrix`` [R, D] or [R] by ``grad``: projection, the rule, norm 1, narrow copy.

    ``grad`` is overwritten where rows are kept at norm 1.
    """
    weight = matrix.weight
    if matrix.unit_rows:
        grad.addcmul_((grad * weight).sum(1, keepdim=True), weight, value=-1)
    rule.update_(weight, grad, matrix.state, lr=lr, step=step)
    if matrix.unit_rows:
        weight.div_(weight.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(weight.dtype).tiny))
    if matrix.low is not None:
        matrix.low.copy_(weight)


# ---- 8-bit states: codes [R, D] and scales [R, Q] -------------------------------------------------------


def encode_mean(mean: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of a mean: 127 times the signed root of its share of the block's largest size."""
    scale = _blockwise(mean.abs()).amax(2)
    share = mean / _spread(scale, mean.shape[1]).clamp_min(torch.finfo(torch.float32).tiny)
    return (share.abs().sqrt() * 127).round().copysign(share).to(torch.int8), scale


def decode_mean(codes: Tensor, scale: Tensor) -> Tensor:
    share = codes.float() / 127
    return share * share.abs() * _spread(scale, codes.shape[1])


def encode_square(square: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of the root of a mean of squares, linear, at least 1 in a block that is not all 0."""
    root = square.sqrt()
    scale = _blockwise(root).amax(2)
    share = root / _spread(scale, square.shape[1]).clamp_min(torch.finfo(torch.float32).tiny)
    return (share * 255).round().clamp_(1, 255).to(torch.uint8), scale


def decode_square(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() / 255 * _spread(scale, codes.shape[1])).square()


def _blockwise(rows: Tensor) -> Tensor:
    """[R, D] -> [R, Q, 256], padded with zeros."""
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % QUANT_BLOCK))
    return rows.unflatten(1, (-1, QUANT_BLOCK))


def _spread(scale: Tensor, columns: int) -> Tensor:
    """[R, Q] -> [R, D]: each column's scale."""
    return scale.repeat_interleave(QUANT_BLOCK, dim=1)[:, :columns]
