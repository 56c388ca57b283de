"""What ``fastsae train`` does: configs from options, model and data from their names, a run, its summary."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from . import demo
from .activation_cache.options import options_of_cache
from .activation_cache.read import CachedActivations
from .activation_cache.training import training_data
from .coder_config import SaeConfig
from .config import TrainConfig
from .data import load_tokens
from .devices import resolve_device, resolve_dtype
from .distributed.joining import joined, local_device
from .distributed.world import World
from .errors import ConfigError
from .model import load_language_model, load_model, load_tokenizer
from .ops import resolve
from .options import build
from .overrides import parse_override
from .placement import check_one_process
from .progress import RunSummary, summary_table
from .report.run import report_run
from .run_config import RunConfig
from .run_folder import claimed_run_folder
from .sources import DEFAULT_DATASET
from .tokens import split_token_names, with_excluded_ids
from .tracking import check_trackers
from .trainer import Trainer
from .training_state import has_state

logger = logging.getLogger("fastsae")


def train_run(options: dict[str, Any]) -> None:
    """Train as ``options`` (by field name, and ``model`` and ``dataset``) ask; print table, folder and next command."""
    cache = None
    if options.get("activations"):
        cache = CachedActivations(Path(options["activations"]).expanduser())
        options = options_of_cache(cache.index, options)
    model_name, dataset_name = options.get("model") or demo.NAME, options.get("dataset")
    if model_name == demo.NAME:
        options = {**demo.TRAINING, **options}
        dataset_name = dataset_name or demo.DATASET
    dataset_name = dataset_name or DEFAULT_DATASET
    run: RunConfig = build(RunConfig, options)
    ids, _ = split_token_names(options.get("exclude_tokens", ()))  # names need a tokenizer: when all else is checked
    cfg: TrainConfig = build(TrainConfig, {**options, "exclude_tokens": ids}, sae=build(SaeConfig, options))

    device = local_device(run.device)
    resolve(cfg.implementation, resolve_device(device))
    check_trackers(cfg.log_to)
    for text in cfg.set:
        parse_override(text)
    # a folder that cannot be written shows now, not after the work
    with joined(device) as world, _claimed(world, cfg, model_name) as folder:
        excluded = with_excluded_ids(options, lambda: load_tokenizer(model_name, run)).get("exclude_tokens", ())
        cfg = dataclasses.replace(cfg, run_name=folder.name, exclude_tokens=excluded)
        trainer = make_trainer(cfg, model_name, dataset_name, run, device, world, cache)
        _say_what_is_trained(trainer)
        summary = fit(trainer)
    if world.first:
        print_result(summary, model_name, options)


def make_trainer(
    cfg: TrainConfig, model_name: str, dataset_name: str, run: RunConfig, device: str | None, world: World,
    cache: CachedActivations | None,
) -> Trainer:  # fmt: skip
    """The trainer on model and data of these names, loaded on ``device``, or on a ``cache`` of them.

    Downloads come once per machine.
    """
    if run.tp_plan is not None and cache is not None:
        raise ConfigError(
            "tp_plan: expected a model that runs, got cached activations, which need none; leave --tp-plan out"
        )
    origin = {"model": model_name, "dataset": dataset_name, **run.to_dict()}
    if cache is not None:
        dtype = None if run.dtype == "auto" else resolve_dtype(run.dtype, resolve_device(device))
        rows, source = training_data(cache, cfg, device=device, dtype=dtype)
        return Trainer(cfg, rows, source, origin=origin, world=world)
    if run.device_map is not None:
        check_one_process(world.size)
    with world.one_first() if run.tp_plan is None else nullcontext():  # in parts, only all together load it
        load = load_model if cfg.loss_fn == "fvu" else load_language_model
        model = load(model_name, dataclasses.replace(run, device=device))
    with world.one_first():
        dataset = load_tokens(dataset_name, run, lambda: load_tokenizer(model_name, run), model.config)
    return Trainer(cfg, dataset, model, origin=origin, world=world)


@contextmanager
def _claimed(world: World, cfg: TrainConfig, model_name: str) -> Iterator[Path]:
    """The run's folder, which rank 0 has found writable."""
    if not world.first:
        yield Path(world.share(""))
        return
    with claimed_run_folder(cfg, model_name) as folder:
        yield Path(world.share(str(folder)))


def fit(trainer: Trainer) -> RunSummary:
    """Train; where that fails, say what there is to go on from."""
    try:
        return trainer.fit()
    except Exception as error:
        if trainer.folder is not None and has_state(trainer.folder) and "--resume" not in str(error):
            logger.info("go on from the last checkpoint with: fastsae train --resume %s", trainer.folder)
        raise


def _say_what_is_trained(trainer: Trainer) -> None:
    logger.info(
        "training %d coders for %d steps: %s", len(trainer.specs), trainer.total_steps, ", ".join(trainer.specs)
    )


def print_result(summary: RunSummary, model_name: str, options: dict[str, Any]) -> None:
    """Table, folder, report of a demo run, next command."""
    report = None
    if model_name == demo.NAME:
        where = {key: options[key] for key in ("device", "dtype") if key in options}
        report = report_run(str(summary.folder), None, None, {"look_at": demo.REPORTED_TOKENS, **where})
    console = Console()
    console.print(summary_table(summary))
    console.print(f"saved in {summary.folder}", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    first = summary.coders[0].name
    console.print(
        f"next: python -c \"from fastsae import FastSae; print(FastSae.load_from_disk('{summary.folder}/{first}'))\"",
        highlight=False,
        soft_wrap=True,
    )
