"""Dot products of chosen pairs of rows, on a CPU.

Shapes: N tokens, D width, L latents, C pairs per token.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

GATHER = 2**22  # numbers gathered at a time where there is no sampled kernel


def sampled_products(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """``x[n] · weight[indices[n, c]]``, [N, C], summed in x's dtype (float32 or float64).

    Where ``weight`` has x's dtype, equal rows give bit-equal products, wherever they stand.
    """
    N, C = indices.shape
    if weight.dtype == x.dtype and x.numel() and C:
        return ragged_products(x, weight, indices.reshape(-1), torch.full((N,), C)).view(N, C)
    out = x.new_empty(N, C)
    step = max(1, GATHER // max(1, C * x.shape[1]))
    for start in range(0, N, step):
        part = slice(start, start + step)
        out[part] = torch.einsum("nd,ncd->nc", x[part], weight[indices[part]].to(x.dtype))
    return out


def ragged_products(x: Tensor, weight: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """``x[n] · weight[l]`` for the next ``counts[n]`` latents l of ``columns`` [P], row by row; [P].

    ``weight`` has x's dtype (float32 or float64); equal rows give bit-equal products, wherever they stand.
    """
    _silence_beta_warning()
    rows = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    pattern = torch.sparse_csr_tensor(rows, columns, x.new_zeros(len(columns)), (len(x), len(weight)))
    return torch.sparse.sampled_addmm(pattern, x, weight.t(), beta=0.0).values()


@functools.cache
def _silence_beta_warning() -> None:
    """torch says once per process that CSR tensors are in beta: let it say so to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
