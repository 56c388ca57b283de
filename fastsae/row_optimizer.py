"""Optimizers over coders that update matrices row by row: as a pass of their own, or inside the backward pass.

Shapes: N tokens, D width in, E width out, L latents.

A :class:`RowOptimizer` is an ordinary ``torch.optim.Optimizer``: gradients in ``.grad``, ``step()``, ``state_dict()``.
Where nothing else needs the gradients of a coder's matrices, :meth:`RowOptimizer.row_step` goes into
``coder_step`` instead and no [L, D] gradient is ever made. Both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastsae_kernels.rules import Adam, Adam8bit, Rows, Rule, Signum
from fastsae_kernels.step_parts import RowStep
from fastsae_kernels.update import update_matrix
from torch import Tensor
from torch.optim import Optimizer

from .sae import FastSae

RULES: dict[str, Rule] = {"adam": Adam(), "adam8bit": Adam8bit(), "signum": Signum()}


class RowOptimizer(Optimizer):
    """``rule`` over coders' parameters, a learning rate per coder.

    Decoders that are kept at unit norm (``normalize_decoder``, autoencoders) see no gradient parallel to their
    rows, and their rows keep norm 1. ``low_dtype`` keeps copies of both matrices in that dtype.
    """

    def __init__(self, coders: Iterable[FastSae], rates: Iterable[float], rule: Rule, low_dtype: torch.dtype | None):
        self.rule = rule
        self.low: dict[Tensor, Tensor] = {}
        """Narrow copies of the matrices, by parameter; made from them again whenever weights were set from outside."""

        groups: list[dict[str, Any]] = []
        for coder, lr in zip(coders, rates, strict=True):
            sphere = on_sphere(coder)
            matrices = [coder.encoder.weight, coder.W_dec]
            groups.append(
                {"params": [p for p in coder.parameters() if p is not coder.W_dec], "lr": lr, "sphere": False}
            )
            groups.append({"params": [coder.W_dec], "lr": lr, "sphere": sphere})
            if low_dtype is not None:
                self.low |= {p: p.detach().to(low_dtype) for p in matrices if p is not None}
        idle = {"params": [], "lr": 0.0, "sphere": False}  # of a rank without coders
        super().__init__(groups or [idle], {"sphere": False})
        self._groups_of = {p: group for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients of matrices are overwritten on the way."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad)

    @torch.no_grad()
    def update(self, parameter: Tensor, grad: Tensor) -> None:
        """One step of one parameter by ``grad``, which may be overwritten."""
        state, group = self._state(parameter), self._groups_of[parameter]
        state["step"] += 1
        moments = {name: tensor for name, tensor in state.items() if name != "step"}
        rows = Rows(parameter.data, moments, group["sphere"], self.low.get(parameter))
        update_matrix(self.rule, rows, grad, lr=float(group["lr"]), step=int(state["step"]))

    def row_step(self, coder: FastSae) -> RowStep:
        """The next step of a coder's two matrices, for ``coder_step`` to take; :meth:`count_row_step` when it has."""
        assert coder.W_dec is not None
        rows = []
        for parameter in (coder.encoder.weight, coder.W_dec):
            state = self._state(parameter)
            moments = {name: tensor for name, tensor in state.items() if name != "step"}
            sphere = self._groups_of[parameter]["sphere"]
            rows.append(Rows(parameter.data, moments, sphere, self.low.get(parameter)))
        step = int(self.state[coder.W_dec]["step"]) + 1
        return RowStep(self.rule, float(self._groups_of[coder.W_dec]["lr"]), step, *rows)

    def count_row_step(self, coder: FastSae) -> None:
        """Count what :meth:`row_step` gave as taken."""
        assert coder.W_dec is not None
        for parameter in (coder.encoder.weight, coder.W_dec):
            self.state[parameter]["step"] += 1

    @contextmanager
    def evaluation_weights(self, coders: Iterable[FastSae]) -> Iterator[None]:
        """The weights to evaluate and save, inside the block: schedule-free rules average them, others do not.

        Averaged decoders are brought back to unit norm where they are kept there.
        """
        parameters = [p for coder in coders for p in coder.parameters() if "z" in self.state.get(p, {})]
        kept = [p.detach().clone() for p in parameters]
        for p in parameters:
            assert isinstance(self.rule, Signum)
            p.data.copy_(self.rule.averaged(p.data, self.state[p]["z"]))
            if self._groups_of[p]["sphere"]:
                p.data.div_(p.data.norm(dim=1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny))
        try:
            yield
        finally:
            for p, values in zip(parameters, kept, strict=True):
                p.data.copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but 8-bit states keep their dtype, and narrow copies are made anew."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            for name, value in saved.get(i, {}).items():
                device = "cpu" if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device, copy=True)
        self._groups_of = {p: group for group in self.param_groups for p in group["params"]}
        self.refresh_low()

    @torch.no_grad()
    def refresh_low(self) -> None:
        """Make the narrow copies anew, after weights were set from outside."""
        for parameter, low in self.low.items():
            low.copy_(parameter)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update(self.rule.new_state(parameter.data))
        return state


def on_sphere(coder: FastSae) -> bool:
    """Whether the coder's decoder rows are kept at unit norm."""
    return coder.cfg.normalize_decoder and not coder.cfg.transcode
