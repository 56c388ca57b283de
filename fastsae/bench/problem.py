"""What the contestants of ``fastsae bench`` are given.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .exact import chunks, dots
from .shapes import Shape


@dataclass(frozen=True)
class Problem:
    """A coder, a batch for it, and the gradients that arrive from above."""

    x: Tensor  # [N, D]
    weight: Tensor  # [L, D]
    bias: Tensor  # [L]
    W_dec: Tensor  # [L, D], unit rows
    b_dec: Tensor  # [D]
    grad_out: Tensor  # [N, D], of the decoder's output
    grad_acts: Tensor  # [N, K], of the encoder's activations
    k: int

    @cached_property
    def centered(self) -> Tensor:
        """``x - b_dec``, rounded to x's dtype, [N, D]."""
        return (self.x.float() - self.b_dec.float()).to(self.x.dtype)

    @cached_property
    def best(self) -> tuple[Tensor, Tensor]:
        """The k largest activations of every token in float64, and their indices, [N, K] each."""
        weight, bias = self.weight.double().t(), self.bias.double()
        parts = [
            torch.addmm(bias, self.centered[part].double(), weight).relu_().topk(self.k)
            for part in chunks(len(self.x), len(self.weight))
        ]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def activations(self, indices: Tensor) -> Tensor:
        """``ReLU(x weightᵀ + bias)`` at ``indices`` in float64, [N, K]."""
        return dots(self.centered, self.weight, indices).add_(self.bias.double()[indices]).relu_()

    @cached_property
    def acts(self) -> Tensor:
        """The best activations rounded to x's dtype, [N, K]: what decoders are given."""
        return self.best[0].to(self.x.dtype)


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Gaussian tokens with a few strong directions, so that latents fire unevenly as in a trained coder."""
    N, D, L = shape.N, shape.D, shape.L
    gen = torch.Generator(device).manual_seed(seed)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device)

    W_dec = torch.nn.functional.normalize(gaussian(L, D), dim=1)
    b_dec, bias = gaussian(D), 0.1 * gaussian(L)
    popular = (torch.rand(N, 4, generator=gen, device=device) ** 3 * L).long().clamp_(max=L - 1)
    x = W_dec[popular].sum(1) * 2 + gaussian(N, D) + b_dec
    weight = gaussian(L, D).mul_(0.1 / D**0.5).add_(W_dec)
    tensors = (x, weight, bias, W_dec, b_dec, gaussian(N, D), gaussian(N, shape.k))
    return Problem(*(t.to(dtype) for t in tensors), k=shape.k)
