"""Where the parts of a model are that is larger than one device: Hugging Face's device maps, and where ids go in."""

from __future__ import annotations

import json
from typing import Any

import torch

from .errors import ConfigError

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The maps that accelerate makes by itself."""


def parse_device_map(text: str | None) -> str | dict[str, int | str] | None:
    """What ``from_pretrained(device_map=)`` takes; raises :class:`ConfigError` for an option's value that is none."""
    if text is None or text in WORDS:
        return text
    try:
        places = json.loads(text)
    except ValueError:
        places = None
    if not isinstance(places, dict) or not places or any(type(at) not in (int, str) for at in places.values()):
        raise ConfigError(
            f"device_map: expected {', '.join(WORDS)}, or a JSON object such as "
            f'{{"h.0": 0, "h.1": "cpu", "ln_f": "disk"}}, got {text!r}'
        )
    return places


def is_spread(model: Any) -> bool:
    """Whether ``model``'s parts are in more than one place."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def check_one_process(processes: int) -> None:
    """Raise :class:`ConfigError` where each of several processes would spread a model over the same devices."""
    if processes > 1:
        raise ConfigError(
            f"device_map: expected one process, which spreads its model over all devices, got {processes}; "
            "leave --device-map or torchrun out, or give --tp-plan auto in its place"
        )


def entry_device(model: Any) -> torch.device:
    """Where ``model``'s token ids go, and its coders live: of a spread model, the first device that computes."""
    places = getattr(model, "hf_device_map", None)
    if places is None:
        return model.device
    gpus = [f"cuda:{at}" if isinstance(at, int) else str(at) for at in places.values()]
    return torch.device(next((at for at in gpus if at not in ("cpu", "disk")), "cpu"))
