"""How this process joins the others of its run, and which device is its own: by torchrun's environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .world import PATIENCE, TIMEOUT, World, peers_needed

_GROUPS: dict[str, Any] = {}


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def local_device(device: str | None) -> str | None:
    """The device that ``device`` (an option's value) means for this process; under torchrun each has a GPU of its own.

    Raises :class:`ConfigError` where there are fewer GPUs than processes on this machine, or one was named for all.
    """
    if not launched() or device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu" if launched() and device is None else device
    if device not in (None, "cuda"):
        raise ConfigError(
            f"device: expected cuda or cpu under torchrun, which gives each process its own, got {device!r}"
        )
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ConfigError(
            f"device: expected {processes} GPUs for torchrun's {processes} processes on this machine, got {gpus}; "
            f"use --nproc-per-node {gpus or 'N with --device cpu'}, or --device cpu"
        )
    return f"cuda:{int(os.environ['LOCAL_RANK'])}"


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """The world of this process; inside the block its ranks can talk to each other. A world of one starts nothing.

    ``device`` is what :func:`local_device` gave. A process group that is there already is used, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield current()
        return
    if not launched():
        yield World()
        return
    on_gpu = device is not None and device.startswith("cuda")
    if device is not None and on_gpu:
        torch.cuda.set_device(torch.device(device))
    with peers_needed(World(int(os.environ["RANK"]))):
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield current()
    finally:
        _GROUPS.clear()
        dist.destroy_process_group()


def current() -> World:
    """The world that :func:`joined` or a program of its own made; of one process where torchrun started none.

    Raises :class:`ConfigError` in one of several processes that has not joined the others: each would train alone.
    """
    if launched() and not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"expected one of the {os.environ['WORLD_SIZE']} processes that torchrun started to have joined the "
            "others, got one that has not; make and fit the Trainer inside: with fastsae.joined(): ..."
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return World()
    for name, timeout in () if _GROUPS else (("host", TIMEOUT), ("patient", PATIENCE)):
        _GROUPS[name] = dist.new_group(backend="gloo", timeout=timeout)
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)), **_GROUPS)
