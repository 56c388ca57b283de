"""What one rank of ``tests/test_placement.py`` does: one of several that are to train on a model in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import token_rows

from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, load_model
from fastsae.distributed.joining import joined
from fastsae.errors import ConfigError
from fastsae.run import make_trainer


def said(work: Any) -> str:
    try:
        work()
    except ConfigError as error:
        return str(error)
    return "nothing"


def main(folder: Path, model: str, device_map: str) -> None:
    cfg = TrainConfig(SaeConfig(num_latents=64, k=4), hookpoints=("h.1",), batch_size=4)
    with joined("cpu") as world:
        run = RunConfig(device_map=device_map)
        by_name = said(lambda: make_trainer(cfg, model, "not there", run, None, world, None))
        loaded = load_model(model, run)
        itself = said(lambda: Trainer(cfg, token_rows(24, 8), loaded, world=world))
        (folder / f"said-{world.rank}").write_text(f"{by_name}\n{itself}")
