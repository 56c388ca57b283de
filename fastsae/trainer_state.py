"""What of a trainer the next step depends on, as plain values and tensors, coder by coder; and back.

Where coders are spread over ranks, every rank has a state of its own coders, or of its rows of them. Going on takes
any number of such parts: a rank picks what it needs, whatever number of ranks wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .checkpoint import ROWS
from .errors import CheckpointError
from .metrics import TrainingMetrics
from .sae import FastSae

State = dict[str, Any]


def state_of(
    coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics], optimizer: Optimizer, schedule: LambdaLR
) -> State:
    """Weights as they are trained (not averaged), optimizer, schedule, sums, dead latents, random numbers."""
    states, places = optimizer.state_dict()["state"], _places(coders, optimizer)
    return {
        "coders": {
            name: {
                "rows": [0, coder.num_latents] if coder.peers is None else [coder.peers.begin, coder.peers.end],
                "weights": dict(coder.state_dict()),
                "optimizer": {parameter: states[i] for parameter, i in places[name].items() if i in states},
                "metrics": metrics[name].state_dict(),
            }
            for name, coder in coders.items()
        },
        "schedule": schedule.last_epoch,
        "random": {"cpu": torch.get_rng_state(), **_cuda_rng(coders)},
    }


def load_into(
    coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics], optimizer: Optimizer, schedule: LambdaLR,
    parts: Sequence[State], dead_threshold: int,
) -> None:  # fmt: skip
    """The inverse of :func:`state_of`, from its ``parts``; raises :class:`CheckpointError` where they lack a coder."""
    places, states = _places(coders, optimizer), {}
    try:
        for name, coder in coders.items():
            state = _slice_of([part["coders"][name] for part in parts if name in part["coders"]], coder)
            coder.load_state_dict(state["weights"])
            metrics[name].load_state_dict(state["metrics"], dead_threshold)
            states |= {places[name][parameter]: values for parameter, values in state["optimizer"].items()}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"resume: the training state does not fit these coders: {error}") from None
    _go_to(schedule, parts[0]["schedule"])
    random = parts[0]["random"]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available() and coders:
        torch.cuda.set_rng_state(random["cuda"], next(iter(coders.values())).device)


def check_same_coders(names: Sequence[str], parts: Sequence[State]) -> None:
    """Raise :class:`CheckpointError` unless the parts are of the coders ``names``, all of them and no others."""
    saved = {name: None for part in parts for name in part["coders"]}
    if sorted(saved) != sorted(names):
        raise CheckpointError(
            f"resume: expected the coders that the run started with, {', '.join(saved)}, got {', '.join(names)}"
        )


def _places(coders: dict[str, FastSae], optimizer: Optimizer) -> dict[str, dict[str, int]]:
    """The optimizer's number of every coder's every parameter."""
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {name: {key: numbers[id(p)] for key, p in coder.named_parameters()} for name, coder in coders.items()}


def _slice_of(saved: list[State], coder: FastSae) -> State:
    """The state of the rows that ``coder`` holds, of those that were ``saved``."""
    begin, end = (0, coder.num_latents) if coder.peers is None else (coder.peers.begin, coder.peers.end)
    saved = sorted(saved, key=lambda state: state["rows"])
    if [[begin, end]] == [state["rows"] for state in saved]:
        return saved[0]

    def rows(*keys: str) -> Tensor:
        parts = []
        for state in saved:
            first, last = state["rows"]
            tensor: Any = state
            for key in keys:
                tensor = tensor[key]
            parts.append(tensor[max(begin - first, 0) : max(min(end, last) - first, 0)])
        return torch.cat(parts)

    first = saved[0]
    optimizer = {
        name: {
            key: rows("optimizer", name, key) if name in ROWS and key != "step" else value for key, value in of.items()
        }
        for name, of in first["optimizer"].items()
    }
    weights = {name: rows("weights", name) if name in ROWS else tensor for name, tensor in first["weights"].items()}
    metrics = {**first["metrics"], "tokens_since_fired": rows("metrics", "tokens_since_fired")}
    return {"weights": weights, "optimizer": optimizer, "metrics": metrics}


def _go_to(schedule: LambdaLR, step: int) -> None:
    """As if ``schedule`` had been stepped ``step`` times: its rates depend on nothing else."""
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1})
    rates = [base * rule(step) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _cuda_rng(coders: dict[str, FastSae]) -> dict[str, torch.Tensor]:
    device = next(iter(coders.values())).device if coders else torch.device("cpu")
    return {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
