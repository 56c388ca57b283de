"""From text to token chunks: tokenise and pack; and tokens that have names.

Shapes: S tokens per sequence (``ctx_len``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .errors import ArtifactError, ConfigError
from .run_config import TOKEN_NAMES

logger = logging.getLogger("fastsae")

DOCUMENTS_PER_BATCH = 2048
"""Documents that are packed together; the unfinished last chunk of every such batch is left out."""


def tokenize(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, *, ctx_len: int, text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset:  # fmt: skip
    """Tokenise and pack into chunks of exactly ``ctx_len`` tokens; documents are separated by EOS.

    Each map batch drops its unfinished last chunk, and may give none at all. Cached by ``datasets``.
    """
    check_text_column(text_column, data.column_names, getattr(data.features.get(text_column), "dtype", "lists"))
    packed = data.map(
        pack,
        fn_kwargs=pack_options(tokenizer, text_column, ctx_len),
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        num_proc=_processes(num_proc, len(data)),
        remove_columns=data.column_names,
        desc="Tokenising",
    )
    if len(packed) == 0:
        raise too_little_text(ctx_len)
    return packed


def pack_options(tokenizer: PreTrainedTokenizerBase, column: str, ctx_len: int) -> dict[str, Any]:
    """The arguments of :func:`pack` behind the batch."""
    return {"tokenizer": tokenizer, "column": column, "ctx_len": ctx_len, "separator": document_start(tokenizer)}


def pack(batch: dict[str, list], tokenizer, column: str, ctx_len: int, separator: list[int]) -> dict[str, list]:
    """A batch of documents -> ``input_ids``, lists of ``ctx_len`` tokens."""
    texts = [text for text in batch[column] if text]
    ids = (
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if texts
        else []
    )
    stream = list(chain.from_iterable(separator + document for document in ids))
    return {"input_ids": [stream[i : i + ctx_len] for i in range(0, len(stream) - ctx_len + 1, ctx_len)]}


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that stands before each document in packed text: EOS, else SEP, else none."""
    separator = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if isinstance(i, int)), None)
    return [] if separator is None else [separator]


def check_text_column(column: str, columns: Iterable[str], kind: str) -> None:
    """Raise :class:`ArtifactError` where there is no such column, or it holds no text (``kind``: its type)."""
    if column not in (columns := list(columns)):
        raise ArtifactError(
            f"dataset: expected a text column {column!r} or tokens in 'input_ids', "
            f"got columns {', '.join(columns)}; choose one with --text-column"
        )
    if kind not in ("string", "large_string", "str"):
        raise ArtifactError(
            f"dataset: expected text in column {column!r}, got {kind}; choose another with --text-column"
        )


def too_little_text(ctx_len: int) -> ArtifactError:
    return ArtifactError(
        f"dataset: expected at least one chunk of {ctx_len} tokens, got fewer tokens than that; "
        "lower --ctx-len or bring more text"
    )


def context_length(wanted: int, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig) -> int:
    """``wanted``, lowered to what tokenizer and model can take, out loud."""
    possible = min(wanted, tokenizer.model_max_length if tokenizer else wanted, most_positions(config) or wanted)
    if possible < wanted:
        logger.info("ctx_len: %d lowered to %d, the most this model can take", wanted, possible)
    return possible


def most_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model's position embeddings allow; None where it has no such limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and "roberta" in config.model_type and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1  # its positions start behind the padding's
    return positions


def split_token_names(values: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(ids, names) of ``--exclude-tokens``, one or a list of them; raises :class:`ConfigError` for what is neither."""
    ids, names = [], []
    values = values if isinstance(values, (list, tuple)) else [values]
    for text in chain.from_iterable(str(value).split(",") for value in values):
        if (text := text.strip()).isdecimal():
            ids.append(int(text))
        elif text in TOKEN_NAMES:
            names.append(text)
        elif text:
            raise ConfigError(
                f"exclude_tokens: expected a token id or one of {', '.join(TOKEN_NAMES)}, got {text!r}; "
                "the ids of other tokens are the tokenizer's business"
            )
    return tuple(ids), tuple(names)


def with_excluded_ids(options: dict[str, Any], tokenizer: Callable[[], PreTrainedTokenizerBase]) -> dict[str, Any]:
    """``options`` with ``exclude_tokens`` as ids; ``tokenizer`` is called where some are given by name."""
    if "exclude_tokens" not in options:
        return options
    ids, names = split_token_names(options["exclude_tokens"])
    if names:
        ids = tuple(sorted({*ids, *named_token_ids(names, tokenizer())}))
        logger.info("left out: %s (ids %s)", ", ".join(names), ", ".join(map(str, ids)))
    return {**options, "exclude_tokens": ids}


def named_token_ids(names: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of tokens by name, ascending; raises :class:`ConfigError` for one that the tokenizer lacks."""
    found: set[int] = set()
    for name in names:
        ids: list[Any] = [getattr(tokenizer, f"{name}_token_id", None)]
        if name == "special":
            ids = list(tokenizer.all_special_ids)
        if not ids or None in ids:
            has = [other for other in TOKEN_NAMES[:-1] if getattr(tokenizer, f"{other}_token_id", None) is not None]
            raise ConfigError(
                f"exclude_tokens: expected a tokenizer with the token {name!r}, got one that has "
                f"{', '.join(has) or 'no special tokens'}; leave {name} out, or give the token's id"
            )
        found.update(ids)
    return tuple(sorted(found))


def _processes(wanted: int | None, rows: int) -> int | None:
    """Half the cores, but no process for fewer than a few hundred documents; None runs in this process."""
    count = min(wanted or (os.cpu_count() or 2) // 2, rows // 256)
    return count if count > 1 else None
