"""What ``fastsae cache`` does: size first, then activations to disk, resumed where they stopped."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.prompt import Confirm
from rich.table import Table

from .. import demo
from ..coder_config import SaeConfig
from ..coders import find_hookpoints
from ..config import TrainConfig
from ..data import load_tokens
from ..errors import ArtifactError, ConfigError, HookpointError
from ..model import load_model, load_tokenizer
from ..options import build
from ..progress import console
from ..rows import RowSource, split_held_out
from ..run_config import RunConfig
from ..sources import DEFAULT_DATASET
from ..tokens import with_excluded_ids
from .config import CacheConfig
from .index import Index
from .options import data_record
from .read import CachedActivations
from .write import open_folder, write_cache

logger = logging.getLogger("fastsae")


def cache_run(model_name: str, dataset: str | None, options: dict[str, Any]) -> Path:
    """Write or finish the cache that the command line asks for; of one that is complete, verify every file."""
    if model_name == demo.NAME:
        options = {"ctx_len": demo.TRAINING["ctx_len"], "max_tokens": demo.TRAINING["max_tokens"], **options}
        dataset = dataset or demo.DATASET
    dataset = dataset or DEFAULT_DATASET
    run: RunConfig = build(RunConfig, options)
    options = with_excluded_ids(options, lambda: load_tokenizer(model_name, run))
    cfg: CacheConfig = build(CacheConfig, options)
    folder = Path(cfg.output).expanduser()
    model = load_model(model_name, run)
    rows, _ = split_held_out(load_tokens(dataset, run, lambda: load_tokenizer(model_name, run), model.config), 0)
    index = open_folder(folder, _plan(cfg, run, model, model_name, dataset, rows))
    if index.done < index.sequences:
        _ask(index, folder, cfg)
        with Progress(console=console) as bar:
            task = bar.add_task("caching", total=index.sequences, completed=index.done)
            write_cache(folder, index, model, rows, cfg.batch_size, cfg.exclude_tokens, lambda n: bar.advance(task, n))
        cache, done = CachedActivations(folder), "written"
    else:
        cache = CachedActivations(folder)
        done = f"complete: {len(list(cache.verify()))} files as they were written"
    size = decimal(sum(shard.bytes for shard in cache.index.shards))
    Console().print(f"{folder}: {cache.tokens:,} tokens, {size}, {done}", highlight=False, soft_wrap=True)
    return folder


def _plan(cfg: CacheConfig, run: RunConfig, model: Any, model_name: str, dataset: str, rows: RowSource) -> Index:
    found = find_hookpoints(model, TrainConfig(SaeConfig(), hookpoints=cfg.hookpoints))
    for at in found.values():
        if at.calls != 1 or (cfg.inputs and at.d_in is None):
            why = f"called {at.calls} times" if at.calls != 1 else "without a float input"
            raise HookpointError(
                f"{at.name}: expected a module called once per forward, with what to store, got one {why}"
            )
    ctx_len = _row_length(rows)
    outputs = {name: at.d_out for name, at in found.items()}
    inputs = {name: at.d_in for name, at in found.items() if at.d_in is not None} if cfg.inputs else {}
    index = Index(
        model=model_name, dataset=dataset, hookpoints=outputs, inputs=inputs, storage=cfg.storage, sequences=len(rows),
        ctx_len=ctx_len, shard_sequences=1,
        data={**data_record(run), "exclude_tokens": list(cfg.exclude_tokens),
              "dtype": str(model.dtype).removeprefix("torch.")},
    )  # fmt: skip
    per_sequence = index.total_bytes // max(1, index.sequences)
    batches = max(1, cfg.shard_mib * 2**20 // per_sequence // cfg.batch_size)  # the model's, whole ones
    return dataclasses.replace(index, shard_sequences=batches * cfg.batch_size)


def _row_length(rows: RowSource) -> int:
    """Tokens in the first row, which stays there to be taken."""
    here = rows.state_dict()
    if not (first := rows.take(1)):
        raise ArtifactError("dataset: expected at least one sequence to cache, got none")
    rows.load_state_dict(here)
    return len(first[0]["input_ids"])


def _ask(index: Index, folder: Path, cfg: CacheConfig) -> None:
    """Say how large it will be, refuse what does not fit, and ask."""
    left = index.total_bytes * (index.sequences - index.done) // index.sequences
    table = Table("hookpoint", box=None, pad_edge=False)
    for column in ("width", "size"):
        table.add_column(column, justify="right")
    for name, width in index.hookpoints.items():
        both = width + index.inputs.get(name, 0)
        table.add_row(name, str(width), decimal(both * index.dtype.itemsize * index.sequences * index.ctx_len))
    Console().print(table)
    home = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(home).free
    told = f"{decimal(left)} to write to {folder} ({index.sequences - index.done} sequences), {decimal(free)} free"
    Console().print(told, highlight=False, soft_wrap=True)
    if left > free:
        raise ArtifactError(f"output: expected {decimal(left)} of free space, got {decimal(free)}; lower --max-tokens")
    if cfg.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("yes: expected --yes where nobody can be asked")
    if not Confirm.ask("write it?"):
        raise SystemExit(0)
