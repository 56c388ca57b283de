"""A model's structure without its weights: torch's fake tensors run its forward, in seconds for any size.

Shapes: B sequences, S tokens each, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..coders import find_hookpoints
from ..config import TrainConfig
from ..errors import ArtifactError, first_line
from ..hookpoints import Hookpoint
from ..hooks import run_hooked
from ..model import empty_model
from ..run_config import RunConfig
from .live_bytes import LiveBytes


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What torch's counter does not know: its fake tensors are on the CPU."""


@dataclass(frozen=True)
class Forward:
    """What a forward of the model on B sequences holds in memory, ``fixed + B · per_sequence`` bytes each."""

    at: dict[str, tuple[int, int]]
    """While a hookpoint's activations are there, these included: (fixed, per sequence), by hookpoint."""

    peak: tuple[int, int]
    """At most, from the first module to the last hookpoint."""

    flops: int
    """Of its matrix products and attention, per sequence."""

    def held(self, hookpoint: str, batch_size: int) -> int:
        fixed, each = self.at[hookpoint]
        return fixed + batch_size * each

    def most(self, batch_size: int) -> int:
        return self.peak[0] + batch_size * self.peak[1]


@dataclass(frozen=True)
class Structure:
    """A model as a plan needs it."""

    kind: str
    """Its class."""

    parameters: int
    weight_bytes: int
    """Of parameters and buffers, as it would be loaded."""

    hookpoints: dict[str, Hookpoint]
    forward: Forward


def look_at_model(name: str, run: RunConfig, cfg: TrainConfig, dtype: torch.dtype, ctx_len: int) -> Structure:
    """The structure of the model ``name``, of which only config.json is read."""
    with FakeTensorMode():
        model = empty_model(name, run, dtype, with_head=cfg.loss_fn != "fvu")
        hookpoints = find_hookpoints(model, cfg)
        forward = _measured(model, hookpoints, ctx_len)
        parameters = sum(p.numel() for p in model.parameters())
        size = sum(_loaded_bytes(model, run.load_in_8bit))
        return Structure(type(model).__name__, parameters, size, hookpoints, forward)


def _measured(model, hookpoints: dict[str, Hookpoint], ctx_len: int) -> Forward:
    """From two sizes of batches: memory grows by the same with every sequence."""
    (at, peak, flops), (more_at, more_peak, more_flops) = (_live(model, hookpoints, ctx_len, B) for B in (2, 3))

    def line(two: int, three: int) -> tuple[int, int]:
        return 3 * two - 2 * three, three - two

    return Forward({name: line(at[name], more_at[name]) for name in at}, line(peak, more_peak), more_flops - flops)


def _live(model, hookpoints: dict[str, Hookpoint], ctx_len: int, batch_size: int) -> tuple[dict[str, int], int, int]:
    at: dict[str, int] = {}
    ids = torch.zeros(batch_size, ctx_len, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, LiveBytes() as live:

        def note(name: str, _inputs, _output) -> None:
            at[name] = max(at.get(name, 0), live.now)

        try:
            run_hooked(model, ids, {name: at.calls for name, at in hookpoints.items()}, note)
        except Exception as error:
            raise ArtifactError(
                f"model: expected {type(model).__name__} to run on {batch_size} x {ctx_len} tokens without weights, "
                f"got {type(error).__name__}: {first_line(error)}; lower --ctx-len"
            ) from error
    return at, live.peak, flops.get_total_flops()


def _loaded_bytes(model, in_8bit: bool) -> Iterator[int]:
    """Bytes of every parameter and buffer; in 8 bits, linear maps take one a number and a float32 scale per row."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if in_8bit else set()
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.numel() + 4 * len(tensor) if id(tensor) in linear else tensor.nbytes
