"""Which sequences to evaluate on: those that training held out, where a run says which they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..collation import Row
from ..data import load_tokens
from ..errors import ArtifactError
from ..options import build
from ..rows import RowSource, split_held_out
from ..run_config import RunConfig

_OF_THE_DATA = (
    "split", "text_column", "ctx_len", "max_examples", "max_tokens", "streaming", "shuffle_seed", "shuffle_buffer",
    "bin_dtype", "data_args",
)  # fmt: skip
_LIMITS = ("max_examples", "max_tokens")


class RunData(NamedTuple):
    """A run's sequences, or those of other data."""

    name: str
    held_out: RowSource | None
    """What the run did not train on; None for data that it did not read."""
    rest: RowSource

    def to_evaluate(self, count: int) -> tuple[list[Row], str]:
        """(the rows held out, or ``count`` others where there are none; what they are in words)."""
        if self.held_out:
            return self.held_out.take(
                len(self.held_out)
            ), f"{len(self.held_out)} sequences of {self.name} held out of training"
        rows = self.rest.take(count)
        if not rows:
            raise ArtifactError(f"dataset: expected at least one sequence in {self.name}, got none")
        return rows, f"{len(rows)} sequences of {self.name}" + (
            "" if self.held_out is None else ", which were trained on"
        )


def run_data(
    dataset: str | None,
    record: dict[str, Any],
    options: dict[str, Any],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
    *,
    sequences: int,
) -> RunData:
    """The data that a run's ``record`` names, split as the run did; or ``sequences`` rows of another ``dataset``.

    The run's own where there is no ``dataset``, or the same, and no option of the command line says otherwise.
    Other data is cut into rows as long as those trained on.
    """
    name = dataset or record.get("dataset")
    if not name:
        raise ArtifactError("dataset: these coders do not say what they were trained on; name a dataset")
    run: RunConfig = build(RunConfig, options)
    trained_on = {key: record[key] for key in _OF_THE_DATA if key in record}
    trained_on["data_args"] = tuple(record.get("data_args", ()))
    choices = {key: getattr(run, key) for key in options if key in _OF_THE_DATA and key not in _LIMITS}
    if name == record.get("dataset") and choices.items() <= trained_on.items():
        rows = load_tokens(name, dataclasses.replace(run, **trained_on), tokenizer, config)
        rest, held_out = split_held_out(rows, record.get("held_out", 0))
        return RunData(name, held_out, rest)
    length = {"ctx_len": trained_on["ctx_len"]} if "ctx_len" in trained_on else {}
    run = dataclasses.replace(run, **{**length, **choices}, max_examples=sequences, max_tokens=None)
    return RunData(name, None, split_held_out(load_tokens(name, run, tokenizer, config), 0)[0])


def evaluation_tokens(
    dataset: str | None,
    record: dict[str, Any],
    options: dict[str, Any],
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
    *,
    sequences: int,
) -> tuple[list[Row], str]:
    """(rows of ``input_ids``, what they are in words); the command line's limits come last. See :func:`run_data`."""
    sequences = options.get("max_examples") or sequences
    rows, where = run_data(dataset, record, options, tokenizer, config, sequences=sequences).to_evaluate(sequences)
    limit = min(len(rows), sequences if "max_examples" in options else len(rows))
    if options.get("max_tokens"):
        limit = min(limit, max(1, options["max_tokens"] // len(rows[0]["input_ids"])))
    return rows[:limit], where
