"""Muon for the coders' matrices and Adam for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from .errors import ConfigError
from .sae import FastSae

LR = 2e-3
"""sparsify's learning rate, whatever the number of latents."""


class MuonAndAdam(Optimizer):
    """torch's Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) on matrices, its Adam on vectors.

    What sparsify does: momentum 0.95, Nesterov, five Newton-Schulz steps in bfloat16, weight decay 0.1, updates
    scaled by 0.2 sqrt(larger side). There are two parameter groups, the matrices' and the vectors', each in the
    order of the coders, the same in every process. Every process takes the whole step; sparsify shares it out.
    """

    def __init__(self, coders: Iterable[FastSae], lr: float):
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optimizer: expected torch 2.9 or newer for 'muon', got {torch.__version__}; "
                "pip install --upgrade torch, or choose another optimizer"
            )
        parameters = [p for coder in coders for p in coder.parameters()]
        matrices: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim == 2]}]
        vectors: list[dict[str, Any]] = [{"params": [p for p in parameters if p.ndim != 2]}]
        self._parts = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam(vectors, lr=lr),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The two optimizers work on this one's groups and state."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
