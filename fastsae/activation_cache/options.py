"""What a cache's record says of the data behind it, and a training run's options that must agree with it."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..options import build
from ..origin import same_model
from ..run_config import RunConfig
from .index import Index

_DATA = (
    "split", "text_column", "ctx_len", "max_examples", "max_tokens", "shuffle_seed", "streaming", "shuffle_buffer",
    "bin_dtype", "data_args", "revision",
)  # fmt: skip


def data_record(run: RunConfig) -> dict[str, Any]:
    """How a dataset is read, for a cache's index."""
    values = {key: getattr(run, key) for key in _DATA}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def options_of_cache(index: Index, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of a run on a cache, with model, dataset, and how it was read, as the cache has them.

    Raises :class:`ConfigError` where they ask for another.
    """
    run: RunConfig = build(RunConfig, options)
    given = {**data_record(run), "model": options.get("model"), "dataset": options.get("dataset")}
    stored = {"model": index.model, "dataset": index.dataset, **{key: index.data.get(key) for key in _DATA}}
    stored = {key: value for key, value in stored.items() if key in index.data or key in ("model", "dataset")}
    for key, value in stored.items():
        if options.get(key) is None or given[key] == value:
            continue
        if key != "model" or not same_model(given[key], value):
            raise ConfigError(
                f"activations: the cache holds {key} = {value!r}, got {given[key]!r}; leave it out, or write another "
                "cache"
            )
    return {"exclude_tokens": tuple(index.data.get("exclude_tokens", ())), **options, **stored}
