"""sparsify's ``chunk_and_tokenize`` on fastsae's packing: fixed-length chunks, documents separated by EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data import tokenize
from ...errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def chunk_and_tokenize(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "torch",
    num_proc: int | None = None,
    text_key: str = "text",
    max_seq_len: int = 2048,
    return_final_batch: bool = False,
    load_from_cache_file: bool = True,
) -> Any:
    """``input_ids`` in chunks of exactly ``max_seq_len`` tokens (or what the tokenizer says its model can take).

    ``load_from_cache_file`` is accepted and does nothing: ``datasets`` caches by content.
    """
    if return_final_batch:
        raise ConfigError("return_final_batch: expected False, got True; fastsae trains on equally long chunks only")
    length = min(tokenizer.model_max_length, max_seq_len)
    tokens = tokenize(data, tokenizer, ctx_len=length, text_column=text_key, num_proc=num_proc)
    return tokens.with_format(format, columns=["input_ids"])
