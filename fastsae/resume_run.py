"""What ``fastsae train --resume RUN`` does: the run's own options, model and data, from its newest whole state on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .activation_cache.options import options_of_cache
from .activation_cache.read import CachedActivations
from .coder_config import SaeConfig
from .config import TrainConfig
from .distributed.joining import joined, local_device
from .errors import ArtifactError
from .options import build
from .resume import check_resume_options, run_config_file
from .run import fit, make_trainer, print_result
from .run_config import RunConfig
from .run_file import read_run_file
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
    names: tuple[str, str] = (record["model"], record["dataset"])
    options = {**record, **given, "save_dir": str(run_folder.parent), "run_name": run_folder.resolve().name}
    options.pop("finetune", None)  # its weights are older than the state's
    cache = None
    if options.get("activations"):
        cache = CachedActivations(Path(options["activations"]).expanduser())
        options = options_of_cache(cache.index, options)
    cfg: TrainConfig = build(TrainConfig, options, sae=build(SaeConfig, options))
    run: RunConfig = build(RunConfig, options)
    device = local_device(run.device)
    with joined(device) as world:
        trainer = make_trainer(cfg, *names, run, device, world, cache)
        trainer.resume(run_folder)
        logger.info("going on after step %d of %d: %s", trainer.step, trainer.total_steps, ", ".join(trainer.coders))
        summary = fit(trainer)
    if world.first:
        print_result(summary, names[0], options)
