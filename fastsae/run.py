"""What ``fastsae train`` does: configs from options, model and data from their names, a run, its summary."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from typing import Any

from rich.console import Console

from . import demo
from .config import SaeConfig, TrainConfig
from .data import load_tokens
from .model import load_model, load_tokenizer, resolve_device
from .ops import resolve
from .options import build
from .progress import summary_table
from .report.run import report_run
from .run_config import RunConfig
from .run_folder import create_run_folder
from .sources import DEFAULT_DATASET
from .tokens import named_token_ids, split_token_names
from .tracking import check_trackers
from .trainer import Trainer

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

    resolve(cfg.implementation, resolve_device(run.device))
    check_trackers(cfg.log_to)
    folder = create_run_folder(cfg, model_name)  # a folder that cannot be written shows now, not after the work
    folder.rmdir()
    cfg = dataclasses.replace(cfg, run_name=folder.name)
    model = load_model(model_name, run)
    tokenizer = cache(lambda: load_tokenizer(model_name, run))
    if excluded_names:
        ids = {*excluded_ids, *named_token_ids(excluded_names, tokenizer())}
        cfg = dataclasses.replace(cfg, exclude_tokens=tuple(sorted(ids)))
        logger.info("not trained on: %s (ids %s)", ", ".join(excluded_names), ", ".join(map(str, cfg.exclude_tokens)))
    dataset = load_tokens(dataset_name, run, tokenizer, model.config)
    origin = {"model": model_name, "dataset": dataset_name, **run.to_dict()}
    trainer = Trainer(cfg, dataset, model, origin=origin)
    logger.info(
        "training %d coders for %d steps: %s", len(trainer.coders), trainer.total_steps, ", ".join(trainer.coders)
    )
    summary = trainer.fit()
    console = Console()
    console.print(summary_table(summary))
    console.print(f"saved in {summary.folder}", highlight=False, soft_wrap=True)
    if model_name == demo.NAME:
        where = {key: options[key] for key in ("device", "dtype") if key in options}
        report = report_run(str(summary.folder), None, None, {"look_at": demo.REPORTED_TOKENS, **where})
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    first = summary.coders[0].name
    console.print(
        f"next: python -c \"from fastsae import FastSae; print(FastSae.load_from_disk('{summary.folder}/{first}'))\"",
        highlight=False,
        soft_wrap=True,
    )
