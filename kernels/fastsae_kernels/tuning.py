"""Opt-in timing of tile sizes: ``FASTSAE_AUTOTUNE=1``. Off by default; the shipped defaults need no warm-up.

Each (kernel, shape, dtype, GPU, Triton version) is timed once, and the winner is kept in memory and in
``tuning.json`` in the user's cache folder (``FASTSAE_CACHE``, else ``$XDG_CACHE_HOME/fastsae``, else
``~/.cache/fastsae``). The number of tokens is no part of the key: a batch of another size neither times nor compiles.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.testing

log = logging.getLogger(__name__)
Config = TypeVar("Config")
_chosen: dict[str, Any] = {}


def enabled() -> bool:
    """Whether the user asked for timing."""
    return os.environ.get("FASTSAE_AUTOTUNE", "0") == "1"


def cache_file() -> Path:
    """Where winners are kept between processes."""
    base = os.environ.get("FASTSAE_CACHE")
    if base is None:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "fastsae")
    return Path(base, "tuning.json")


def gpu_milliseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` on the GPU."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))  # type: ignore[arg-type]


def tuned(
    kernel: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    device_name: str,
    candidates: Sequence[Config],
    run: Callable[[Config], object],
    timer: Callable[[Callable[[], object]], float] = gpu_milliseconds,
) -> Config:
    """The fastest of ``candidates`` (frozen dataclasses, the default first) at ``run``; the default if none works.

    A candidate that raises (too much shared memory, say) is out. A kept winner that is no longer a candidate is
    timed again. While a CUDA graph is recorded nothing is timed.
    """
    key = "|".join([kernel, *(f"{n}={v}" for n, v in shape.items()), str(dtype), device_name, triton.__version__])
    if key not in _chosen:
        kept = _read().get(key)
        matching = [c for c in candidates if asdict(c) == kept]  # type: ignore[call-overload]
        if not matching and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[key] = matching[0] if matching else _time(key, candidates, run, timer)
    return _chosen[key]


def _time(key: str, candidates: Sequence[Config], run: Callable[[Config], object], timer) -> Config:
    times: dict[Config, float] = {}
    for candidate in candidates:
        try:
            times[candidate] = timer(lambda candidate=candidate: run(candidate))
        except Exception as error:
            log.info("tuning %s: %s does not run: %s", key, candidate, error)
    if not times:
        return candidates[0]
    best = min(times, key=times.__getitem__)
    log.info("tuning %s: chose %s, %.3f ms", key, best, times[best])
    _write(_read() | {key: asdict(best)})  # type: ignore[call-overload]
    return best


def _read() -> dict[str, Any]:
    try:
        entries = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or not ours to trust
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(entries: dict[str, Any]) -> None:
    """Replace the file in one step, so that a reader beside us never sees half of it; a read-only home is fine."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        log.info("tuning: not kept in %s: %s", path, error)
