"""A coder on disk, in sparsify's format: a folder with ``cfg.json`` and ``sae.safetensors``.

This room knows configs and tensors; :class:`fastsae.FastSae` makes modules of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .coder_config import SaeConfig
from .coder_folders import CONFIG_FILE
from .errors import ArtifactError, CheckpointError, ConfigError
from .integrity import check_finite, sha256, write_beside
from .integrity import write_json as write_json

WEIGHTS_FILE = "sae.safetensors"

HASH = "sha256"
"""The note that holds the weights file's hash."""

ROWS = {"encoder.weight", "encoder.bias", "W_dec"}
"""Tensors with a row per latent."""

Widths = tuple[int, int]
"""(d_in, d_out): of what a coder encodes, and of what it reconstructs."""

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle"}


def read_coder(folder: Path | str) -> tuple[SaeConfig, Widths, dict[str, Tensor], dict[str, Any]]:
    """(config, (d_in, d_out), tensors in the file's dtypes, fastsae's own notes) of one saved coder, verified.

    Raises :class:`CheckpointError` where the folder holds no coder, or a damaged one: cut off, of other shapes than
    cfg.json says, not finite, or not the file whose hash cfg.json records.
    """
    folder = Path(folder)
    values = _read_config(folder / CONFIG_FILE)
    if values.get("signed"):
        raise CheckpointError(
            f"{folder}: expected a coder with ReLU, got one with signed activations (sparsify, mid-2024), "
            "which select by magnitude; load it with the sparsify release that trained it"
        )
    weights = folder / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES), None)
        found = f"found {pickled}, which could run code and is not opened" if pickled else "found none"
        raise CheckpointError(f"{folder}: expected {WEIGHTS_FILE} beside {CONFIG_FILE}, {found}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: not a readable safetensors file ({error})") from None
    values = _matching_config(folder, values)
    d_in = _width(folder, values, "d_in", "the input width")
    d_out = _width(folder, {"d_out": d_in, **values}, "d_out", "the output width")
    try:
        cfg = SaeConfig.from_dict({name: value for name, value in values.items() if name != "d_out"})
        widths = d_in, cfg.output_width(d_in, d_out)
        _check_shapes(folder, tensors, cfg, widths)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    check_finite(weights, tensors)
    return cfg, widths, tensors, _notes(values)


def write_coder(
    folder: Path | str, cfg: SaeConfig, widths: Widths, tensors: dict[str, Tensor], notes: dict[str, Any]
) -> None:
    """Write one coder, whole or not at all: after a crash at any point, the old one or the new one reads back."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_coder_file(folder, cfg, widths, lambda beside: save_file(cpu, beside), notes)


def write_coder_file(
    folder: Path | str, cfg: SaeConfig, widths: Widths, write: Callable[[Path], Any], notes: dict[str, Any]
) -> None:
    """The same, of a coder whose weights' file ``write`` writes.

    Both files are written beside, then renamed; should only the weights have been, the config beside still fits.
    ``d_out`` is only written where it is another than ``d_in``: sparsify knows one width.
    """
    d_in, d_out = widths

    def text(weights: Path) -> str:
        other = {} if d_out == d_in else {"d_out": d_out}
        values = {**cfg.to_dict(), "d_in": d_in, **other, "fastsae": {**notes, HASH: sha256(weights)}}
        return json.dumps(values, indent=2) + "\n"

    _write_both(Path(folder), write, text)


def copy_coder(source: Path, folder: Path) -> None:
    """The same coder in another folder, written as :func:`write_coder` writes."""
    text = (source / CONFIG_FILE).read_text(encoding="utf-8")
    _write_both(folder, lambda beside: shutil.copyfile(source / WEIGHTS_FILE, beside), lambda _: text)


def _write_both(folder: Path, write: Callable[[Path], Any], config_of: Callable[[Path], str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_beside(folder / WEIGHTS_FILE, write)
    text = config_of(weights)
    try:
        config = write_beside(folder / CONFIG_FILE, lambda beside: beside.write_text(text, encoding="utf-8"))
    except ArtifactError:
        weights.unlink()
        raise
    os.replace(weights, folder / WEIGHTS_FILE)
    os.replace(config, folder / CONFIG_FILE)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"expected a coder's folder with {path.name}, found none in {path.parent}; "
            "for a run with several coders name the hookpoint, or use load_many"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _notes(values: dict[str, Any]) -> dict[str, Any]:
    notes = values.get("fastsae")
    return notes if isinstance(notes, dict) else {}


def _matching_config(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """``values``, or where a crash came between the two renames of a save, the config that was written beside."""
    if not (recorded := _notes(values).get(HASH)):
        return values  # of sparsify, or of an earlier release
    found = sha256(folder / WEIGHTS_FILE)
    if found == recorded:
        return values
    beside = folder / f"{CONFIG_FILE}.part"
    if beside.is_file() and _notes(newer := _read_config(beside)).get(HASH) == found:
        return newer
    raise CheckpointError(
        f"{folder / WEIGHTS_FILE}: expected the file that was saved, with sha256 {recorded[:12]}…, got {found[:12]}…: "
        f"it was damaged or replaced; take an earlier checkpoint, or if you changed it, drop {HASH} from {CONFIG_FILE}"
    )


def _width(folder: Path, values: dict[str, Any], name: str, what: str) -> int:
    width = values.get(name)
    if not isinstance(width, int) or width < 1:
        raise CheckpointError(f"{folder / CONFIG_FILE}: expected {name}, {what}, got {width!r}")
    return width


def _check_shapes(folder: Path, tensors: dict[str, Tensor], cfg: SaeConfig, widths: Widths) -> None:
    d_in, d_out = widths
    num_latents = cfg.latents_for(d_in)
    expected: dict[str, tuple[int, ...]] = {
        "encoder.weight": (num_latents, d_in), "encoder.bias": (num_latents,), "W_dec": (num_latents, d_out),
        "b_dec": (d_out,),
    }  # fmt: skip
    if cfg.skip_connection:
        expected["W_skip"] = (d_out, d_in)
    if cfg.activation == "batchtopk":
        expected["threshold"] = ()
    for name, shape in expected.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape and not (name == "W_dec" and got is None):  # a file may leave the decoder out
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: expected {name} {list(shape)} from {CONFIG_FILE}, "
                f"got {'nothing' if got is None else list(got)}"
            )
    if extra := set(tensors) - set(expected):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: unexpected tensors {sorted(extra)}; not a sparsify coder")
    if not all(torch.is_floating_point(t) for t in tensors.values()):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: expected floating-point tensors")
