"""Scores ``x Wᵀ + b`` on a CPU, by whichever of torch's two libraries is the faster there.

Shapes: n tokens, D width, L latents.

torch multiplies float32 matrices by MKL, which does not know AMD's CPUs: on two cores of an EPYC it reaches 95 to 185
GFLOP/s with 256 tokens or more, oneDNN, which torch brings for its compiler, 175 to 215; for one token it takes half
the time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def scores(x: Tensor, weight: Tensor, bias: Tensor, scratch: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` [n, L] of x [n, D], weight [L, D] and bias [L]; in ``scratch`` [>= n, L] where there is one.

    All of one dtype, float32 or float64. Sums' order differs between the libraries, not their precision.
    """
    if scratch is None:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return torch.addmm(bias, x, weight.t(), out=scratch[: len(x)])


def scratch_for(x: Tensor, weight: Tensor, rows: int) -> Tensor | None:
    """Memory for the scores of ``rows`` tokens at a time; None where oneDNN takes its own."""
    return None if by_onednn(x, weight) else x.new_empty(rows, len(weight))


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies ``x`` and ``weight``."""
    some = x.dtype == torch.float32 and x.numel() > 0 and len(weight) > 0
    return some and torch.backends.mkldnn.enabled and _faster()


@functools.cache
def _faster() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and is_amd()


def is_amd() -> bool:
    """Whether AMD made this CPU."""
    return "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
