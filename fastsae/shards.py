"""Models that several processes hold together (``--tp-plan``): which activations are slices there, and all of them.

Shapes: B sequences, S tokens each, D width of a module's input or output.

Of a layer that is split by a tensor-parallel plan every process computes its heads and its neurons. What the layer
gives in the end is summed, and whole everywhere; what appears inside of it is a slice. Which is which is told by the
shapes of the undivided model, whose forward runs on tensors without memory, and by comparing values between processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .errors import ConfigError, HookpointError, LostRankError, first_line
from .hookpoints import Hookpoint, probe
from .hooks import run_hooked
from .placement import entry_device

TOKENS = 3
"""Tokens that are looked at."""


class Slices(NamedTuple):
    """The axis, from the last, of which a process has a part of what a module takes and gives; None: it has all."""

    input: int | None
    output: int | None


def processes(model: Any) -> int:
    """How many processes hold ``model`` together; 1: each has one of its own."""
    return getattr(model, "tp_size", None) or 1


def probe_whole(model: Any, names: Sequence[str]) -> dict[str, Hookpoint]:
    """As :func:`fastsae.hookpoints.probe`, with the widths of the undivided model."""
    if processes(model) == 1:
        return probe(model, names)
    with _undivided(model) as twin:
        return probe(twin, names)


def find_slices(model: Any, names: Sequence[str]) -> dict[str, Slices]:
    """What a process has of each hookpoint's activations; all processes call this together.

    Raises :class:`HookpointError` where these are neither whole nor a slice, :class:`ConfigError` where only some of
    the processes hold the model.
    """
    if not dist.is_initialized() or dist.get_world_size() != processes(model):
        here = dist.get_world_size() if dist.is_initialized() else 1
        raise ConfigError(
            f"tp_plan: expected a model that all {here} processes hold together, got one of {processes(model)}; "
            "load it with tp_size left out"
        )
    own = _look(model, names)
    with _undivided(model) as twin:
        wholes = _look(twin, names)
    return {
        name: Slices(*(_axis(name, part, whole) for part, whole in zip(own[name], wholes[name], strict=True)))
        for name in names
    }


def join(part: Tensor, axis: int | None) -> Tensor:
    """The whole of what every process has a slice of, in the order of ranks; all processes call this together."""
    return part if axis is None else torch.cat(_gathered(part), axis)


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error``, of a model's forward, says that another process that holds a part of it is gone."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in said or "nccl" in said)


def lost_peer(error: BaseException) -> LostRankError:
    return LostRankError(
        "model: another rank, which holds a part of it, ended, failed or did not answer, and says why itself "
        f"({first_line(error)})"
    )


def _gathered(part: Tensor) -> list[Tensor]:
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, part)
    except RuntimeError as error:
        raise lost_peer(error) from error
    return parts


@contextmanager
def _undivided(model: Any) -> Iterator[Any]:
    """The same base model in one piece, on tensors without memory."""
    config = copy.deepcopy(model.base_model.config)
    if hasattr(config, "distributed_config"):
        config.distributed_config = None
    with FakeTensorMode():
        made = type(model.base_model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
        yield made.eval().requires_grad_(False)


def _look(model: Any, names: Sequence[str]) -> dict[str, tuple[Tensor | None, Tensor]]:
    """(input, output) of each module on a few tokens."""
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}
    ids = torch.arange(TOKENS, device=entry_device(model))[None]
    run_hooked(model, ids, dict.fromkeys(names, 0), lambda name, x, y: seen.update({name: (x, y)}))
    return seen


def _axis(name: str, part: Tensor | None, whole: Tensor | None) -> int | None:
    if part is None or whole is None:
        return None
    ranks = dist.get_world_size()
    here, full = list(part.shape), list(whole.shape)
    if here == full:
        if all(torch.allclose(other, part) for other in _gathered(part)):
            return None
        raise _neither(name, f"{here} numbers that differ between processes")
    axes = [axis for axis in range(-len(here), 0) if len(here) == len(full) and here[axis] != full[axis]]
    if len(axes) != 1 or here[axes[0]] * ranks != full[axes[0]]:
        raise _neither(name, f"{here} of {full} on {ranks} processes")
    return axes[0]


def _neither(name: str, got: str) -> HookpointError:
    return HookpointError(
        f"{name}: --tp-plan expects activations that are whole on every process, or a slice of one axis in equal "
        f"parts, got {got}; choose another hookpoint, such as the whole layer or MLP"
    )
