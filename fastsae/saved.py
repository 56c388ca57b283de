"""Coders by name, wherever and however they are saved; what is known of their training; where they fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import WEIGHTS_FILE
from .coder_folders import CONFIG_FILE, download, find_coders
from .compat import convert
from .compat.formats.sparsify import to_fastsae
from .errors import ArtifactError, CheckpointError, HookpointError
from .hookpoints import probe, resolve_hookpoints
from .origin import Origin, misfits
from .sae import FastSae

RUN_FILE = "config.json"


def load_coders(source: str, device: Any = "cpu", *, hookpoints: tuple[str, ...] = ()) -> dict[str, FastSae]:
    """Every coder of a run's folder, one coder's folder, or a hub repository, by name (``h.0.mlp``).

    Other libraries' files are read where :class:`FastSae` can compute what they hold. ``hookpoints`` keeps the
    coders that match one of the wildcards, each of which must match one.
    """
    path = Path(source).expanduser()
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise CheckpointError(f"coders: expected a run's folder or a hub id, got {source!r}, which is no folder here")
    root = path if path.is_dir() else download(source)
    if (root / CONFIG_FILE).is_file() and (root / WEIGHTS_FILE).is_file():
        coder = FastSae.load_from_disk(root, device)
        coders = {coder.notes.get("hookpoint") or root.resolve().name: coder}
    elif any((folder / WEIGHTS_FILE).is_file() for folder in find_coders(root).values()):
        coders = FastSae.load_many(root, local=True, device=device)
    else:
        read = convert.load_all(root)
        coders = {name or coder.hookpoint or root.name: to_fastsae(coder).to(device) for name, coder in read.items()}
    return _matching(coders, hookpoints, source)


def _matching(coders: dict[str, FastSae], patterns: tuple[str, ...], source: str) -> dict[str, FastSae]:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in coders):
            names = ", ".join(list(coders)[:8])
            raise CheckpointError(f"expected coders matching {pattern!r} in {source}, found none; it holds: {names}")
    wanted = patterns or ("*",)
    return {name: coder for name, coder in coders.items() if any(_matches(name, pattern) for pattern in wanted)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[0], pattern)


def run_record(source: str) -> dict[str, Any]:
    """What the run in a folder was told to do (its config.json, or that of the folder above); {} where unknown."""
    path = Path(source).expanduser()
    for folder in (path, path.resolve().parent) if path.is_dir() else ():
        try:
            record = json.loads((folder / RUN_FILE).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "sae" in record:
            return record
    return {}


def check_origin(name: str, coder: FastSae, model_name: str) -> None:
    """Refuse a coder whose own notes name another hookpoint or model; coders without notes pass."""
    here = Origin(model=model_name or None, hookpoint=name.partition("/")[0])
    if wrong := misfits(Origin.from_notes(coder.notes), here):
        raise CheckpointError(f"{name}: {'; '.join(wrong)}; name the folder and the model so, or pass --force")


def check_places(model: Any, coders: Iterable[tuple[str, FastSae]]) -> dict[str, int]:
    """How often a forward calls the hookpoint of each coder, by hookpoint; every coder must fit its own.

    Raises :class:`HookpointError` where there is no such module, :class:`CheckpointError` where widths differ.
    """
    coders = list(coders)
    names = resolve_hookpoints(model, sorted({name.partition("/")[0] for name, _ in coders}))
    found = probe(model, names)
    for name, coder in coders:
        if (at := found.get(name.partition("/")[0])) is None:
            raise HookpointError(f"{name}: expected a module with a float output, got none when the model ran")
        here = (at.d_in if coder.cfg.transcode else at.d_out), at.d_out
        if here != (coder.d_in, coder.d_out):
            raise CheckpointError(
                f"{name}: expected a coder of width {_widths(*here)} for this model, got one of width "
                f"{_widths(coder.d_in, coder.d_out)}; was it trained on another?"
            )
    return {name: at.calls for name, at in found.items()}


def _widths(d_in: int | None, d_out: int) -> str:
    return str(d_out) if d_in == d_out else f"{d_in} → {d_out}"


def coder_input(coder: FastSae, x: Tensor | None, y: Tensor) -> Tensor:
    """What a coder encodes of a module that got ``x`` and gave ``y``: a transcoder ``x``, an autoencoder ``y``."""
    if not coder.cfg.transcode:
        return y
    assert x is not None  # check_places has seen it
    return x


def default_model(record: dict[str, Any], coders: Iterable[FastSae]) -> str:
    """The model that a run's record names, or all of its coders; raises :class:`ArtifactError` where none is named."""
    named = {record.get("model") or Origin.from_notes(coder.notes).model for coder in coders}
    if len(named) != 1 or not (name := named.pop()):
        raise ArtifactError("model: these coders do not say which model they were trained on; name one")
    return name
