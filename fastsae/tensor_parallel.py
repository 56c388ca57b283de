"""How transformers is told to load one model into all processes, each a part of every layer (``--tp-plan``)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed.configuration_utils import DistributedConfig

from .errors import ConfigError


def plan_options(plan: str, device: torch.device) -> dict[str, Any]:
    """Options of ``from_pretrained``; raises :class:`ConfigError` where there are no processes to divide a model."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        raise ConfigError(
            "tp_plan: expected the processes of one training run, which hold the model together, got a single one; "
            "start it with: torchrun --nproc-per-node N -m fastsae train ... --tp-plan auto, or leave --tp-plan out"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "tp_plan: expected a GPU per process, where transformers puts the model's parts, got --device cpu; "
            "leave --device out, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_plan=plan, tp_size=processes)}  # type: ignore[arg-type]
    return {"tp_plan": plan}  # transformers 5.10


def has_no_plan(error: BaseException) -> bool:
    """Whether transformers says by ``error`` that it has no plan for a model; before 5.11 it loads it whole."""
    return "no `tp_plan`" in str(error)


def no_plan(model: str) -> ConfigError:
    return ConfigError(
        f"tp_plan: expected a model that transformers has a tensor-parallel plan for (Llama, Qwen, Gemma, ...), "
        f"got {model}, which has none; use --device-map auto in one process, or leave --tp-plan out"
    )
