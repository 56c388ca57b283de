"""What ``fastsae train`` does: configs from options, model and data from their names, a run, its summary."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from rich.console import Console

from . import demo
from .config import RunConfig, SaeConfig, TrainConfig
from .data import DEFAULT_DATASET, load_tokens
from .model import load_model, load_tokenizer, resolve_device
from .options import build
from .progress import summary_table
from .run_folder import create_run_folder
from .trainer import Trainer

logger = logging.getLogger("fastsae")


def train_run(model_name: str, dataset_name: str | None, options: dict[str, Any]) -> None:
    """Train as the command line asks, then print the table, the folder and the next command."""
    if model_name == demo.NAME:
        options = {**demo.TRAINING, **options}
        dataset_name = dataset_name or demo.DATASET
    dataset_name = dataset_name or DEFAULT_DATASET
    cfg: TrainConfig = build(TrainConfig, options, sae=build(SaeConfig, options))
    run: RunConfig = build(RunConfig, options)

    resolve_device(run.device)
    folder = create_run_folder(cfg, model_name)  # a folder that cannot be written shows now, not after the work
    folder.rmdir()
    cfg = dataclasses.replace(cfg, run_name=folder.name)
    model = load_model(model_name, run)
    dataset = load_tokens(dataset_name, run, lambda: load_tokenizer(model_name, run), model.config)
    origin = {"model": model_name, "dataset": dataset_name, **run.to_dict()}
    trainer = Trainer(cfg, dataset, model, origin=origin)
    logger.info(
        "training %d coders for %d steps: %s", len(trainer.coders), trainer.total_steps, ", ".join(trainer.coders)
    )
    summary = trainer.fit()
    console = Console()
    console.print(summary_table(summary))
    console.print(f"saved in {summary.folder}", highlight=False, soft_wrap=True)
    first = summary.coders[0].name
    console.print(
        f"next: python -c \"from fastsae import FastSae; print(FastSae.load_from_disk('{summary.folder}/{first}'))\"",
        highlight=False,
        soft_wrap=True,
    )
