"""A rank that falls while the others train, under torchrun: ``failing_worker.py FOLDER kill|disk``."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer, joined


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        cfg = TrainConfig(
            SaeConfig(num_latents=64, k=4), hookpoints=("h.1",), batch_size=2, save_every=3, save_dir=str(folder),
            run_name="run",
        )  # fmt: skip
        trainer = Trainer(cfg, token_rows(200, 8), make_model("gpt2"), world=world)
        step = trainer.train_step

        def fall() -> None:
            (folder / "fell.json").write_text(json.dumps({"time": time.time(), "rank": world.rank}))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))  # as if the disk were full

        def train_step(batches, *counts) -> None:
            if trainer.step == 2 and world.rank == (0 if how == "disk" else 1):
                fall()
            step(batches, *counts)

        trainer.train_step = train_step  # type: ignore[method-assign]
        trainer.fit(progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
