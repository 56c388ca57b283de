"""What ``fastsae train`` does: configs from options, model and data from their names, a run, its summary."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import demo
from .config import SaeConfig, TrainConfig
from .data import load_tokens
from .distributed.world import World, joined, local_device
from .model import load_model, load_tokenizer, resolve_device
from .ops import resolve
from .options import build
from .overrides import parse_override
from .progress import RunSummary, summary_table
from .report.run import report_run
from .run_config import RunConfig
from .run_folder import claimed_run_folder
from .sources import DEFAULT_DATASET
from .tokens import named_token_ids, split_token_names
from .tracking import check_trackers
from .trainer import Trainer
from .training_state import has_state

logger = logging.getLogger("fastsae")


def train_run(options: dict[str, Any]) -> None:
    """Train as ``options`` (by field name, and ``model`` and ``dataset``) ask; print table, folder and next command."""
    model_name, dataset_name = options.get("model") or demo.NAME, options.get("dataset")
    if model_name == demo.NAME:
        options = {**demo.TRAINING, **options}
        dataset_name = dataset_name or demo.DATASET
    dataset_name = dataset_name or DEFAULT_DATASET
    excluded_ids, excluded_names = split_token_names(options.get("exclude_tokens", ()))
    options = {**options, "exclude_tokens": excluded_ids}
    cfg: TrainConfig = build(TrainConfig, options, sae=build(SaeConfig, options))
    run: RunConfig = build(RunConfig, options)

    device = local_device(run.device)
    resolve(cfg.implementation, resolve_device(device))
    check_trackers(cfg.log_to)
    for text in cfg.set:
        parse_override(text)
    # a folder that cannot be written shows now, not after the work
    with joined(device) as world, _claimed(world, cfg, model_name) as folder:
        cfg = dataclasses.replace(cfg, run_name=folder.name)
        model, tokenizer = load_here(model_name, run, device, world)
        if excluded_names:
            cfg = _exclude(cfg, excluded_names, tokenizer())
        with world.one_first():
            dataset = load_tokens(dataset_name, run, tokenizer, model.config)
        origin = {"model": model_name, "dataset": dataset_name, **run.to_dict()}
        trainer = Trainer(cfg, dataset, model, origin=origin, world=world)
        _say_what_is_trained(trainer)
        summary = fit(trainer)
    if world.first:
        print_result(summary, model_name, options)


def load_here(
    name: str, run: RunConfig, device: str | None, world: World
) -> tuple[PreTrainedModel, Callable[[], PreTrainedTokenizerBase]]:
    """(the model on this process's device, a function that loads its tokenizer); downloads come once per machine."""
    with world.one_first():
        model = load_model(name, dataclasses.replace(run, device=device))
    return model, cache(lambda: load_tokenizer(name, run))


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


def _exclude(cfg: TrainConfig, names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
    ids = tuple(sorted({*cfg.exclude_tokens, *named_token_ids(names, tokenizer)}))
    logger.info("not trained on: %s (ids %s)", ", ".join(names), ", ".join(map(str, ids)))
    return dataclasses.replace(cfg, exclude_tokens=ids)


def _say_what_is_trained(trainer: Trainer) -> None:
    for at in trainer.hookpoints.values():
        if at.calls > 1:
            logger.info(
                "%s: the model calls it %d times in a forward (shared weights); one coder is trained on all of them",
                at.name, at.calls,
            )  # fmt: skip
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
