"""Where in a model a coder can sit: names, wildcards, widths.

Names are relative to the base model (``h.0.mlp.act``, ``layers.3``), in natural order.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from natsort import natsorted
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import demo
from .errors import ArtifactError, HookpointError, first_line
from .hooks import run_hooked
from .placement import entry_device


class Hookpoint(NamedTuple):
    """One place in a model where a coder can sit."""

    name: str
    module: str
    """The module's class."""
    d_in: int | None
    """Width of its input; None where no float tensor comes in."""
    d_out: int
    """Width of its output."""
    calls: int
    """How often one forward of the model calls it."""


def resolve_hookpoints(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Module names that match the wildcards, in natural order; every pattern must match something."""
    names = [name for name, _ in model.base_model.named_modules() if name]
    return match_names(patterns, names, f"module of {type(model).__name__}", f"List all with: {listing(model)}")


def listing(model: PreTrainedModel) -> str:
    """The command that lists a model's modules."""
    name = demo.NAME if model.name_or_path == str(demo.MODEL_DIR) else model.name_or_path or "MODEL"
    return f"fastsae hookpoints {name}"


def match_names(patterns: Sequence[str], names: Sequence[str], what: str, way_out: str) -> list[str]:
    """Those of ``names`` that match the wildcards, in natural order; every pattern must match something."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4)
            hint = f"close matches: {', '.join(close)}" if close else f"names look like {', '.join(names[:4])}"
            raise HookpointError(f"no {what} matches hookpoint {pattern!r}; {hint}. {way_out}")
        found.update(matches)
    return natsorted(found)


def layer_hookpoints(model: PreTrainedModel, layers: Sequence[int] = ()) -> list[str]:
    """The names of the model's layers (their output is the residual stream); all, or those numbered."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    lists = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
    if len(lists) != 1:
        raise HookpointError(
            f"expected one list of {count} layers in {type(model).__name__}, found {lists or 'none'}; "
            'name the modules instead: --hookpoints "PATTERN"'
        )
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise HookpointError(f"expected layers from 0 to {count - 1}, got {wrong[0]}")
    return [f"{lists[0]}.{layer}" for layer in (layers or range(count))]


def probe(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Hookpoint]:
    """Run the model on two tokens, then on three, and look at what each named module takes and gives.

    Left out are modules that are not called, give no float tensor, or one whose last axis follows the number of
    tokens: attention weights are no features.
    """
    shapes: dict[str, tuple[int | None, int]] = {}
    calls: Counter[str] = Counter()

    def look(name: str, inputs: Tensor | None, output: Tensor) -> None:
        shapes[name] = (None if inputs is None else inputs.shape[-1], output.shape[-1])
        calls[name] += 1

    def widths(tokens: int) -> dict[str, int]:
        shapes.clear()
        calls.clear()
        ids = torch.zeros(1, tokens, dtype=torch.long, device=entry_device(model))
        try:
            run_hooked(model, ids, dict.fromkeys(names, 0), look)
        except Exception as error:
            raise ArtifactError(
                f"model: expected {type(model).__name__} to run on {tokens} token ids, got {type(error).__name__}: "
                f"{first_line(error)}; a causal or encoder model of transformers does"
            ) from error
        return {name: width for name, (_, width) in shapes.items()}

    two, three = widths(2), widths(3)
    shapes = {name: shape for name, shape in shapes.items() if two.get(name) == three[name]}
    return {
        name: Hookpoint(name, type(model.base_model.get_submodule(name)).__name__, *shapes[name], calls[name])
        for name in names
        if name in shapes
    }
