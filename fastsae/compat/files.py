"""Reading files that strangers wrote: no code is run, no path leaves its folder, every failure is one line."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, first_line


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; plain values only, no objects."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as YAML ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a YAML mapping, got {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the file's dtypes."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"expected {path.name} in {path.parent}, found none") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a ``.pt`` file, tensors and plain values only: a pickle that would run code is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"expected {path.name} in {path.parent}, found none") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: not a readable torch file of tensors and plain values: it is damaged, or a pickle that asks for "
            "other code to be run, which is not done; ask its author for a state_dict"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable torch file ({first_line(error)})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{path}: expected a dict of tensors by name, got {type(values).__name__}")
    return values


def take(tensors: dict[str, Any], names: dict[str, str], where: Path) -> dict[str, Any]:
    """Tensors under new names: ``names`` maps ours to the file's; each must be there and be a tensor."""
    found: dict[str, Any] = {}
    for ours, theirs in names.items():
        tensor = tensors.get(theirs)
        if not isinstance(tensor, Tensor):
            got = "nothing" if tensor is None else type(tensor).__name__
            raise CheckpointError(
                f"{where}: expected a tensor {theirs}, got {got}; it holds {', '.join(sorted(tensors))}"
            )
        found[ours] = tensor
    return found


def matrix_t(tensor: Tensor, name: str, where: Path) -> Tensor:
    """A matrix, transposed and contiguous."""
    if tensor.ndim != 2:
        raise CheckpointError(f"{where}: expected a matrix {name}, got shape {list(tensor.shape)}")
    return tensor.T.contiguous()


def safe_name(name: str) -> str:
    """``name`` if it can be a folder below another one (``h.0.mlp/seed1``); else :class:`CheckpointError`."""
    parts = name.split("/")
    if not all(re.fullmatch(r"[\w@+=-][\w.@+=-]*", part) for part in parts):
        raise CheckpointError(
            f"expected a name made of letters, digits and . _ - for a coder, got {name!r}, which could leave its folder"
        )
    return name
