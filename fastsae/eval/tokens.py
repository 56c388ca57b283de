"""Which sequences to evaluate on: those that training held out, where a run says which they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data import held_out_sequences, load_tokens
from ..errors import ArtifactError
from ..options import build
from ..run_config import RunConfig

_OF_THE_DATA = ("split", "text_column", "ctx_len", "max_examples", "max_tokens", "shuffle_seed")
_LIMITS = ("max_examples", "max_tokens")


def evaluation_tokens(
    dataset: str | None,
    record: dict[str, Any],
    options: dict[str, Any],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
    *,
    sequences: int,
) -> tuple[Any, str]:
    """(rows of ``input_ids``, what they are in words).

    Without ``dataset``, or with the one that the run's ``record`` names, and the same split, column, length and
    seed: the sequences that the run held out. Any other data: its first ``sequences`` after shuffling, as long
    as those trained on. ``options`` are those of the command line; its limits come last.
    """
    name = dataset or record.get("dataset")
    if not name:
        raise ArtifactError("dataset: these coders do not say what they were trained on; name a dataset")
    run: RunConfig = build(RunConfig, options)
    trained_on = {key: record[key] for key in _OF_THE_DATA if key in record}
    choices = {key: value for key, value in options.items() if key in _OF_THE_DATA and key not in _LIMITS}
    same = name == record.get("dataset") and all(trained_on.get(key) == value for key, value in choices.items())
    if same:
        rows = load_tokens(name, dataclasses.replace(run, **trained_on), tokenizer, config)
        kept_out = held_out_sequences(record.get("held_out", 0), len(rows))
        where = f"{kept_out} sequences of {name} that training held out"
        rows = rows.select(range(len(rows) - kept_out, len(rows)))
        if not kept_out:
            raise ArtifactError(f"dataset: the run held nothing of {name} out; name another dataset or --split")
    else:
        run = dataclasses.replace(run, **({"ctx_len": trained_on["ctx_len"]} if "ctx_len" in trained_on else {}))
        run = dataclasses.replace(run, **choices, max_examples=None, max_tokens=None)
        rows = load_tokens(name, run, tokenizer, config)
        rows = rows.select(range(min(sequences, len(rows))))
        where = f"{len(rows)} sequences of {name} ({run.split})"
    return _limited(rows, options), where


def _limited(rows: Any, options: dict[str, Any]) -> Any:
    limit = min(len(rows), options.get("max_examples") or len(rows))
    if options.get("max_tokens") and limit:
        limit = min(limit, max(1, options["max_tokens"] // len(rows[0]["input_ids"])))
    return rows.select(range(limit))
