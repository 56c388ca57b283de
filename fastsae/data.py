"""From text to token chunks: load, tokenise, pack.

Shapes: S tokens per sequence (``ctx_len``). The result is a Hugging Face dataset whose ``input_ids`` are
all of length S.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from . import demo
from .config import RunConfig
from .errors import ArtifactError

logger = logging.getLogger("fastsae")

DEFAULT_DATASET = "EleutherAI/SmolLM2-135M-10B"
"""What ``fastsae train MODEL`` trains on, as sparsify does."""

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}


def load_data(name: str, run: RunConfig) -> Dataset:
    """The dataset ``name``: a hub id, a ``save_to_disk`` folder, a file or folder of parquet, jsonl, json, csv,
    arrow or txt files (one document each), or ``stdlib``, the running Python's standard library.
    """
    path = Path(name).expanduser()
    if name == demo.DATASET:
        return _load_files("text", demo.stdlib_sources(), run.split)
    if path.is_file():
        return _load_files(_builder(path), [path], run.split)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _pick_split(load_from_disk(str(path)), name, run.split)
        files = sorted(file for file in path.rglob("*") if file.suffix in _BUILDERS and file.is_file())
        builders = {_builder(file) for file in files}
        if len(builders) != 1:
            raise ArtifactError(
                f"dataset: expected a save_to_disk folder, or one kind of file in {name} ({', '.join(_BUILDERS)}), "
                f"found {', '.join(sorted(builders)) or 'none'}"
            )
        return _load_folder(builders.pop(), path, run.split)
    if name.startswith((".", "/", "~")):
        raise ArtifactError(f"dataset: expected a file, a folder or a hub id, got {name!r}, which does not exist here")
    return _load_hub(name, run)


def tokenize(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, *, ctx_len: int, text_column: str = "text",
    num_proc: int | None = None,
) -> Dataset:  # fmt: skip
    """Tokenise and pack into chunks of exactly ``ctx_len`` tokens; documents are separated by EOS.

    Each map batch drops its unfinished last chunk, and may give none at all. Cached by ``datasets``.
    """
    if text_column not in data.column_names:
        raise ArtifactError(
            f"dataset: expected a text column {text_column!r} or tokens in 'input_ids', "
            f"got columns {', '.join(data.column_names)}; choose one with --text-column"
        )
    kind = getattr(data.features[text_column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ArtifactError(
            f"dataset: expected text in column {text_column!r}, got {kind or 'lists'}; "
            "choose another with --text-column"
        )
    packed = data.map(
        _pack,
        fn_kwargs={
            "tokenizer": tokenizer, "column": text_column, "ctx_len": ctx_len,
            "separator": document_start(tokenizer),
        },
        batched=True,
        batch_size=2048,
        num_proc=_processes(num_proc, len(data)),
        remove_columns=data.column_names,
        desc="Tokenising",
    )  # fmt: skip
    if len(packed) == 0:
        raise ArtifactError(
            f"dataset: expected at least one chunk of {ctx_len} tokens, got fewer tokens than that; "
            "lower --ctx-len or bring more text"
        )
    return packed


def load_tokens(
    name: str,
    run: RunConfig,
    tokenizer: PreTrainedTokenizerBase | Callable[[], PreTrainedTokenizerBase],
    config: PreTrainedConfig,
) -> Dataset:
    """Load, tokenise (unless ``input_ids`` are there), shuffle, cut to the limits: rows of ``input_ids``.

    ``tokenizer`` may be a function that loads one: it is called only where there is text to tokenise.
    """
    data = load_data(name, run)
    if "input_ids" in data.column_names:
        logger.info("dataset is tokenised already: using its input_ids")
        keep = {"input_ids", "attention_mask"}
        data = data.remove_columns([column for column in data.column_names if column not in keep])
    else:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = tokenizer()
        ctx_len = context_length(run.ctx_len, tokenizer, config)
        data = tokenize(
            data, tokenizer, ctx_len=ctx_len, text_column=run.text_column, num_proc=run.data_preprocessing_num_proc
        )
    data = data.shuffle(seed=run.shuffle_seed).with_format("torch")
    limit = len(data) if run.max_examples is None else min(run.max_examples, len(data))
    if run.max_tokens is not None and limit:
        limit = min(limit, max(1, run.max_tokens // len(data[0]["input_ids"])))
    return data.select(range(limit))


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that stands before each document in packed text: EOS, else SEP, else none."""
    separator = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if isinstance(i, int)), None)
    return [] if separator is None else [separator]


def held_out_sequences(wanted: int, rows: int) -> int:
    """How many sequences at the end of a dataset of ``rows`` a run keeps out of training."""
    return min(wanted, rows // 20)


def context_length(wanted: int, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """``wanted``, lowered to what tokenizer and model can take, out loud."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or wanted
    if "roberta" in config.model_type and config.pad_token_id is not None:  # its positions start behind the padding's
        positions -= config.pad_token_id + 1
    possible = min(wanted, tokenizer.model_max_length, positions)
    if possible < wanted:
        logger.info("ctx_len: %d lowered to %d, the most this model can take", wanted, possible)
    return possible


def _pack(batch: dict[str, list], tokenizer, column: str, ctx_len: int, separator: list[int]) -> dict[str, list]:
    texts = [text for text in batch[column] if text]
    ids = (
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if texts
        else []
    )
    stream = list(chain.from_iterable(separator + document for document in ids))
    return {"input_ids": [stream[i : i + ctx_len] for i in range(0, len(stream) - ctx_len + 1, ctx_len)]}


def _processes(wanted: int | None, rows: int) -> int | None:
    """Half the cores, but no process for fewer than a few hundred documents; None runs in this process."""
    count = min(wanted or (os.cpu_count() or 2) // 2, rows // 256)
    return count if count > 1 else None


def _builder(path: Path) -> str:
    if path.suffix not in _BUILDERS:
        raise ArtifactError(f"dataset: expected one of {', '.join(_BUILDERS)}, got {path.name}")
    return _BUILDERS[path.suffix]


def _load_files(builder: str, files: list[Path], split: str) -> Dataset:
    if split != "train":
        raise ArtifactError(f"dataset: {files[0].name} has the split train only, not {split!r}; leave --split out")
    return _read(builder, files[0], data_files=[str(file) for file in files], split=split)


def _load_folder(builder: str, folder: Path, split: str) -> Dataset:
    """Splits are told by names, as on the hub (``train-0.parquet``, ``test/a.txt``); without them all is train."""
    return _read(builder, folder, path=str(folder), split=split)


def _read(builder: str, source: Path, *, path: str | None = None, **options: Any) -> Dataset:
    if builder == "text":
        options["sample_by"] = "document"
    try:
        return load_dataset(path or builder, **options)  # type: ignore[return-value]
    except (DatasetGenerationError, DatasetNotFoundError, ValueError) as error:
        raise ArtifactError(f"dataset: could not read {source} as {builder}: {_reason(error)}") from None


def _load_hub(name: str, run: RunConfig) -> Dataset:
    try:
        return load_dataset(name, split=run.split, token=run.hf_token)  # type: ignore[return-value]
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise ArtifactError(
            f"dataset: expected a hub id, a file or a folder, got {name!r}: {_reason(error)} "
            "Check the name, the network and --hf-token; 'stdlib' needs none of them"
        ) from None


def _pick_split(data: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if split not in data:
        raise ArtifactError(
            f"dataset: {name} has the splits {', '.join(map(str, data))}, not {split!r}; choose with --split"
        )
    return data[split]


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of equally many tokens -> ``input_ids [B, S]``, and ``attention_mask [B, S]`` where rows have one."""
    batch = {
        key: [torch.as_tensor(row[key], dtype=torch.int64) for row in rows]
        for key in ("input_ids", "attention_mask")
        if key in rows[0]
    }
    lengths = sorted({len(ids) for ids in batch["input_ids"]})
    if len(lengths) > 1:
        raise ArtifactError(
            f"dataset: expected input_ids of one length, got lengths from {lengths[0]} to {lengths[-1]}; pack them, "
            "pad them with an attention_mask, or bring the text instead of input_ids"
        )
    return {key: torch.stack(tensors) for key, tensors in batch.items()}
