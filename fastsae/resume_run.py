"""What ``fastsae train --resume RUN`` does: the run's own options, model and data, from its newest whole state on."""

from __future__ import annotations

import logging
from typing import Any

from .config import SaeConfig, TrainConfig
from .data import load_tokens
from .distributed.world import joined, local_device
from .errors import ArtifactError
from .options import build
from .resume import check_resume_options, run_config_file
from .run import fit, load_here, print_result
from .run_config import RunConfig
from .run_file import read_run_file
from .trainer import Trainer
from .training_state import check_has_state

logger = logging.getLogger("fastsae")


def resume_run(folder: str, given: dict[str, Any]) -> None:
    """Go on with the run in ``folder``; ``given``: the options beside --resume, of those that change no numbers."""
    check_resume_options(given)
    file = run_config_file(folder)
    run_folder = file.parent
    check_has_state(run_folder)  # a run that is finished shows now, not after loading the model
    record = read_run_file(file, (SaeConfig, TrainConfig, RunConfig))
    if not (record.get("model") and record.get("dataset")):
        raise ArtifactError(
            f"resume: expected model and dataset in {file}, got a run of a Trainer without origin; "
            "make the Trainer again and call its resume"
        )
    names: dict[str, str] = {"model": record["model"], "dataset": record["dataset"]}
    options = {**record, **given, "save_dir": str(run_folder.parent), "run_name": run_folder.resolve().name}
    options.pop("finetune", None)  # its weights are older than the state's
    cfg: TrainConfig = build(TrainConfig, options, sae=build(SaeConfig, options))
    run: RunConfig = build(RunConfig, options)
    device = local_device(run.device)
    with joined(device) as world:
        model, tokenizer = load_here(names["model"], run, device, world)
        with world.one_first():
            dataset = load_tokens(names["dataset"], run, tokenizer, model.config)
        trainer = Trainer(cfg, dataset, model, origin={**names, **run.to_dict()}, world=world)
        trainer.resume(run_folder)
        logger.info("going on after step %d of %d: %s", trainer.step, trainer.total_steps, ", ".join(trainer.coders))
        summary = fit(trainer)
    if world.first:
        print_result(summary, names["model"], options)
