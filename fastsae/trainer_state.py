"""What of a trainer the next step depends on, as plain values and tensors; and back."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .errors import CheckpointError
from .metrics import TrainingMetrics
from .sae import FastSae


def state_of(
    coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics], optimizer: Optimizer, schedule: LambdaLR
) -> dict[str, Any]:
    """Weights as they are trained (not averaged), optimizer, schedule, sums, dead latents, random numbers."""
    found = optimizer.state_dict()
    return {
        "coders": {name: dict(coder.state_dict()) for name, coder in coders.items()},
        "metrics": {name: coder_metrics.state_dict() for name, coder_metrics in metrics.items()},
        "optimizer": {**found, "state": {str(i): values for i, values in found["state"].items()}},
        "schedule": schedule.state_dict(),
        "random": {"cpu": torch.get_rng_state(), **_cuda_rng(coders)},
    }


def load_into(
    coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics], optimizer: Optimizer, schedule: LambdaLR,
    state: dict[str, Any], dead_threshold: int,
) -> None:  # fmt: skip
    """The inverse of :func:`state_of`; raises :class:`CheckpointError` where the state is of other coders."""
    if list(state["coders"]) != list(coders):
        raise CheckpointError(
            f"resume: expected the coders that the run started with, {', '.join(state['coders'])}, "
            f"got {', '.join(coders)}"
        )
    try:
        for name, coder in coders.items():
            coder.load_state_dict(state["coders"][name])
            metrics[name].load_state_dict(state["metrics"][name], dead_threshold)
        found = state["optimizer"]
        optimizer.load_state_dict({**found, "state": {int(i): values for i, values in found["state"].items()}})
        schedule.load_state_dict(state["schedule"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"resume: the training state does not fit these coders: {error}") from None
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"], next(iter(coders.values())).device)


def _cuda_rng(coders: dict[str, FastSae]) -> dict[str, torch.Tensor]:
    device = next(iter(coders.values())).device
    return {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
