"""The losses: fraction of variance unexplained (FVU) and AuxK.

Shapes: N tokens, D width. All sums are float32 (float64 for float64 input), whatever the input's precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


def total_variance(y: Tensor) -> Tensor:  # [N, D] -> []
    """Σ ‖y_n - mean(y)‖²: the denominator of FVU."""
    return ops.squared_distance(y, y.mean(0, dtype=torch.promote_types(y.dtype, torch.float32)))


def fvu(residual: Tensor, variance: Tensor) -> Tensor:  # [N, D], [] -> []
    """Fraction of variance unexplained: Σ ‖y_n - ŷ_n‖² over ``variance``; 0 is perfect, 1 is the mean."""
    return _wide(residual).square().sum() / variance


def auxk(residual: Tensor, residual_hat: Tensor, num_dead: Tensor, k_aux: int, variance: Tensor) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2): dead latents learn the residual that is left.

    ``residual`` y - ŷ is a target, not differentiated. With fewer than ``k_aux`` dead latents the loss
    shrinks in proportion, down to 0 with none.
    """
    scale = (num_dead / k_aux).clamp(max=1.0)
    return scale * fvu(residual_hat - residual.detach(), variance)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
