"""The device and the precision that a run asks for, checked against this machine, as transformers takes them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from .errors import ConfigError
from .placement import parse_device_map
from .run_config import RunConfig
from .tensor_parallel import plan_options


def resolve_device(device: str | None) -> torch.device:
    """The device asked for, checked; by default cuda where there is one, else cpu; mps has no kernels."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}") from None
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: expected a GPU for {device!r}, got a machine or a torch build without one; use --device cpu, "
            "or install a CUDA build of torch"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device!r}")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: expected Apple's Metal for 'mps', got a machine without it; use --device cpu")
    return wanted


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision asked for; auto is bfloat16 on a GPU that has it, float32 elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def loading_options(run: RunConfig) -> tuple[torch.device, dict[str, Any]]:
    """(device, options of from_pretrained); raises :class:`ConfigError` for what this machine cannot do."""
    device = resolve_device(run.device)
    options: dict[str, Any] = {"dtype": resolve_dtype(run.dtype, device)}
    if run.attn_implementation is not None:
        options["attn_implementation"] = run.attn_implementation
    if run.load_in_8bit:
        options |= _in_8bit(device)
    if (device_map := parse_device_map(run.device_map)) is not None:
        _require_package("accelerate", "device_map", "accelerate")
        options["device_map"] = device_map
    if run.tp_plan is not None:
        options |= plan_options(run.tp_plan, device)
        _require_package("accelerate", "tp_plan", "accelerate")
    return device, options


def _in_8bit(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        raise ConfigError(
            f"load_in_8bit: expected a GPU to load the model on, got {device}; leave it out, or use --device cuda"
        )
    for package in ("bitsandbytes", "accelerate"):
        _require_package(package, "load_in_8bit", "'fastsae[8bit]'")
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


def _require_package(package: str, field: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{field}: expected the package {package!r}, it is not installed; pip install {install}")
