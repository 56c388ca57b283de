"""A run described in a file, for ``fastsae train --config run.yaml``: YAML, or the ``config.json`` that a run saves.

Keys are the options' names (with ``-`` or ``_``), and ``model`` and ``dataset``; a coder's may stand under ``sae``:

    model: gpt2
    hookpoints: ["h.*.mlp"]
    sae: {k: 64, expansion_factor: 16}
    lr: 2e-4
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .options import close_names

NOT_OPTIONS = {"version"}
"""What a saved config.json says beside a run's options."""


def read_run_file(path: Path | str, configs: tuple[type, ...]) -> dict[str, Any]:
    """Option values by field name, as :func:`fastsae.options.build` takes them, and ``model`` and ``dataset``.

    Raises :class:`ConfigError` where there is no such file, or it is no YAML, or has a key that is no option.
    """
    path = Path(path).expanduser()
    known = {field.name for config in configs for field in dataclasses.fields(config)} | {"model", "dataset"}
    values = _flatten(path, _parse(path))
    for key in values:
        if key not in known - {"sae"}:
            raise ConfigError(f"{path.name}: expected options' names, got {key!r}{close_names(key, sorted(known))}")
    if values.get("hf_token") is not None:
        raise ConfigError(f"{path.name}: expected no access token in a file; use --hf-token, or log in to the hub")
    return {key: value for key, value in values.items() if value is not None}


def _parse(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config: expected a YAML or JSON file, got {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {path} is not readable: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"config: expected key: value pairs in {path}, got {type(values).__name__}")
    return values


def _flatten(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of keys; None stands for the default."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name == "sae" and isinstance(value, Mapping):
            inner = _flatten(path, value)
        elif isinstance(value, Mapping) and name == "data_args":
            inner = {name: [f"{k}={v}" for k, v in value.items()]}
        elif isinstance(value, Mapping):
            raise ConfigError(f"{path.name}: expected a value or a list for {name!r}, got {dict(value)!r}")
        else:
            inner = {name: value}
        if doubled := flat.keys() & inner.keys() - NOT_OPTIONS:
            raise ConfigError(f"{path.name}: expected {min(doubled)} once, got it twice")
        flat |= {name: value for name, value in inner.items() if name not in NOT_OPTIONS}
    return flat
