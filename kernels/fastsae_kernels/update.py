"""An optimizer's step of a whole matrix whose gradient is there: the separate pass, where fusion is not possible.

Shapes: L rows, D columns.
"""

from __future__ import annotations

from torch import Tensor

from .rules import Rows, Rule, update_rows

BLOCK_BYTES = 6 * 2**20
"""Rows updated at a time on a CPU: projection, moments, norms and copy while they are in cache."""


def update_matrix(rule: Rule, matrix: Rows, grad: Tensor, *, lr: float, step: int) -> None:
    """Step number ``step`` (from 1) of ``matrix`` [L, D] or [L] by ``grad``, which may be overwritten.

    On a GPU with Triton one kernel reads and writes everything once; elsewhere blocks of rows stay in cache.
    """
    weight = matrix.weight
    if weight.is_cuda and weight.ndim == 2:
        from . import row_update  # Triton loads where it is used

        if row_update.fits(rule, matrix):
            row_update.update(rule, matrix, grad, lr=lr, step=step)
            return
    rows = max(1, BLOCK_BYTES // (weight.element_size() * max(1, weight[0].numel())))
    for begin in range(0, len(weight), rows):
        update_rows(rule, matrix.part(begin, begin + rows), grad[begin : begin + rows], lr=lr, step=step)
