"""From a dataset's name to rows of token ids: map-style, memory-mapped or streamed.

Shapes: S tokens per sequence (``ctx_len``). Every row's ``input_ids`` has length S.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .collation import token_ids
from .errors import ArtifactError
from .hub import looks_local
from .memmap import SUFFIX, MemmapTokens
from .run_config import RunConfig
from .sources import is_saved, load_data
from .stream import TokenStream, first_row, readable
from .tokens import (
    DOCUMENTS_PER_BATCH,
    check_text_column,
    context_length,
    most_positions,
    pack,
    pack_options,
    tokenize,
    too_little_text,
)

logger = logging.getLogger("fastsae")

KEPT = ("input_ids", "attention_mask")
"""The columns of tokenised data that a run reads."""


def load_tokens(
    name: str,
    run: RunConfig,
    tokenizer: PreTrainedTokenizerBase | Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
) -> Any:
    """Load, tokenise (unless ``input_ids`` are there), shuffle, cut to the limits: rows of ``input_ids``.

    A map-style dataset; with ``--streaming`` a :class:`fastsae.stream.TokenStream`; for a ``.bin`` file
    a :class:`fastsae.memmap.MemmapTokens`. ``tokenizer`` may be a function that loads one: it is called only
    where there is text to tokenise.
    """
    if name.endswith(SUFFIX):
        return _load_memmap(name, run, config)
    data = load_data(name, run)
    load_tokenizer = (lambda: tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer
    if isinstance(data, IterableDataset):
        return _stream_tokens(data, run, load_tokenizer, config)
    if "input_ids" in data.column_names:
        logger.info("dataset is tokenised already: using its input_ids")
        data = data.remove_columns([column for column in data.column_names if column not in KEPT])
    else:
        loaded = load_tokenizer()
        data = tokenize(
            data, loaded, ctx_len=context_length(run.ctx_len, loaded, config), text_column=run.text_column,
            num_proc=run.data_preprocessing_num_proc,
        )  # fmt: skip
    if len(data) == 0:
        raise ArtifactError("dataset: expected at least one row, got an empty dataset")
    data = data.shuffle(seed=run.shuffle_seed).with_format("torch")
    return data.select(range(min(len(data), _limit(run, _row_length(data[0], config)))))


def foresee_rows(name: str, run: RunConfig, config: PreTrainedConfig) -> tuple[int | None, int, bool]:
    """(rows, tokens in each, whether they are just as many) of what :func:`load_tokens` would give.

    Nothing is tokenised or downloaded: what has to be counts as the most that ``run``'s limits allow, None without any.
    """
    path = Path(name).expanduser()
    if name.endswith(SUFFIX):
        rows = _load_memmap(name, run, config)
        return len(rows), len(rows[0]["input_ids"]), True
    if looks_local(name) and not path.exists():
        load_data(name, run)  # says what is wrong
    if is_saved(path) and not run.streaming:
        data: Any = load_data(name, run)
        if "input_ids" in data.column_names and len(data):
            length = _row_length(data[0], config)
            return min(len(data), _limit(run, length)), length, True
    length = context_length(run.ctx_len, None, config)
    limit = _limit(run, length)
    return (None if limit == sys.maxsize else limit), length, False


def _load_memmap(name: str, run: RunConfig, config: PreTrainedConfig) -> MemmapTokens:
    if not (path := Path(name).expanduser()).is_file():
        raise ArtifactError(f"dataset: expected a {SUFFIX} file of token ids, got {name!r}, which does not exist here")
    ctx_len = context_length(run.ctx_len, None, config)
    tokens = MemmapTokens(path, ctx_len, run.bin_dtype).shuffle(run.shuffle_seed)
    return tokens.select(range(min(len(tokens), _limit(run, ctx_len))))


def _stream_tokens(data: IterableDataset, run: RunConfig, load_tokenizer, config: PreTrainedConfig) -> TokenStream:
    first = first_row(data)
    if "input_ids" in first:
        logger.info("dataset is tokenised already: using its input_ids")
        data, length = data.select_columns([key for key in first if key in KEPT]), _row_length(first, config)
    else:
        kind = "string" if isinstance(first.get(run.text_column), str) else type(first.get(run.text_column)).__name__
        check_text_column(run.text_column, first, kind)
        tokenizer = load_tokenizer()
        length = context_length(run.ctx_len, tokenizer, config)
        data = data.map(
            pack, fn_kwargs=pack_options(tokenizer, run.text_column, length), batched=True,
            batch_size=DOCUMENTS_PER_BATCH, remove_columns=list(first),
        )  # fmt: skip
        if readable(lambda: next(iter(data.take(1)), None)) is None:
            raise too_little_text(length)
    return TokenStream(data, _limit(run, length), buffer=run.shuffle_buffer, seed=run.shuffle_seed)


def _limit(run: RunConfig, row_length: int) -> int:
    """Rows of ``row_length`` tokens that the run's limits allow; without limits, more than there can be."""
    limits = [run.max_examples or sys.maxsize]
    if run.max_tokens is not None:
        limits.append(max(1, run.max_tokens // row_length))
    return min(limits)


def _row_length(row: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """The number of tokens in a row that was tokenised before, checked against what the model can take."""
    length, possible = len(token_ids(row["input_ids"])), most_positions(config)
    if length == 0:
        raise ArtifactError("dataset: expected tokens in 'input_ids', got an empty row")
    if possible and length > possible:
        raise ArtifactError(
            f"dataset: expected rows of at most {possible} tokens for this model, got rows of {length}; "
            "cut them, or bring the text instead of input_ids"
        )
    return length
