"""Bytes that a run's coders hold from its first step to its last: weights, gradients, optimizer states, counters.

Shapes: D width in, E width out, L latents (of a slice, those in it). Coders are trained in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..coders import CoderSpec
from ..config import TrainConfig
from ..row_optimizer import RULES

FLOAT = 4


class Kept(NamedTuple):
    """Bytes of one coder, or summed over several."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    """The matrices once more in the model's narrower precision, in which a GPU computes."""
    counters: int = 0
    """How long every latent has been silent, and whether it fired in this step."""

    def __add__(self, other: Kept) -> Kept:  # type: ignore[override]
        return Kept(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        return sum(self)


def shapes(spec: CoderSpec, num_latents: int) -> dict[str, tuple[int, ...]]:
    """A coder's parameters by name, as :class:`fastsae.FastSae` makes them."""
    found: dict[str, tuple[int, ...]] = {
        "encoder.weight": (num_latents, spec.d_in), "encoder.bias": (num_latents,),
        "W_dec": (num_latents, spec.d_out), "b_dec": (spec.d_out,),
    }  # fmt: skip
    return found | ({"W_skip": (spec.d_out, spec.d_in)} if spec.sae.skip_connection else {})


def kept(spec: CoderSpec, num_latents: int, cfg: TrainConfig, *, in_place: bool, low: torch.dtype | None) -> Kept:
    """``in_place``: matrices take their step inside the backward pass, without gradients; ``low``: of the copies."""
    sizes = {name: _numbers(shape) for name, shape in shapes(spec, num_latents).items()}
    matrices = sizes["encoder.weight"] + sizes["W_dec"]
    weights = FLOAT * sum(sizes.values())
    gradients = weights - (FLOAT * matrices if in_place else 0)
    optimizer = sum(_states(shape, cfg.optimizer) for shape in shapes(spec, num_latents).values())
    if cfg.optimizer not in RULES:  # others compute with the weights alone
        low = None
    return Kept(weights, gradients, optimizer, 0 if low is None else low.itemsize * matrices, 9 * num_latents)


def _states(shape: tuple[int, ...], optimizer: str) -> int:
    """Bytes of the optimizer's state of one parameter, as its rule makes it; bnb_adam8bit's are like adam8bit's."""
    if optimizer == "muon":  # a momentum of every matrix, and Adam on vectors
        return FLOAT * _numbers(shape) * (1 if len(shape) == 2 else 2)
    rule = RULES["adam8bit" if optimizer == "bnb_adam8bit" else optimizer]
    return sum(state.nbytes for state in rule.new_state(torch.empty(shape, device="meta")).values())


def takes_step_in_place(cfg: TrainConfig, calls: int, *, fuses: bool, parts: int) -> bool:
    """Whether nothing needs the gradients of whole matrices (``StepTrainer._in_place``); ``calls`` of a module."""
    whole = cfg.grad_acc_steps == parts == calls == 1 and cfg.max_grad_norm is None and cfg.loss_fn == "fvu"
    by_autograd = cfg.sae.multi_topk and cfg.sae.activation != "topk"
    return whole and fuses and not by_autograd and cfg.optimizer in RULES


def _numbers(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)
