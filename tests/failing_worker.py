"""What one rank of ``tests/test_failing_ranks.py`` does: one of them falls while the others train."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer, joined

OF_TWO: dict[str, dict[str, Any]] = {
    "kill": {"rank": 1, "says": r"Signal 9 \(SIGKILL\)"},
    "disk": {"rank": 0, "says": "output: could not write"},
    "forward": {"rank": 0, "says": "RuntimeError: the model fails here"},
    "forward, modules": {"rank": 1, "distribute_modules": True, "says": "RuntimeError: the model fails here"},
    "forward, latents": {"rank": 0, "distribute_latents": 2, "says": "RuntimeError: the model fails here"},
}
"""Which of two ranks falls, how (the first word), in which mode, and what is to be read afterwards."""

OF_THREE: dict[str, dict[str, Any]] = {
    "kill": {"rank": 2, "says": r"Signal 9 \(SIGKILL\)"},
    "forward": {"rank": 1, "says": "RuntimeError: the model fails here"},
    "forward, modules": {"rank": 2, "distribute_modules": True, "says": "RuntimeError: the model fails here"},
    "forward, latents": {"rank": 1, "distribute_latents": 3, "says": "RuntimeError: the model fails here"},
}
"""The same of three ranks."""

CASES = {2: OF_TWO, 3: OF_THREE}


def main(folder: Path, ranks: int, name: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun's agent ends them: here they end by themselves
    case, how = CASES[ranks][name], name.partition(",")[0]
    mode = {key: value for key, value in case.items() if key.startswith("distribute")}
    with joined("cpu") as world:
        cfg = TrainConfig(
            SaeConfig(num_latents=64, k=4), hookpoints=("h.0", "h.1"), batch_size=2, save_every=3,
            save_dir=str(folder), run_name="run", **mode,
        )  # fmt: skip
        trainer = Trainer(cfg, token_rows(200, 8), make_model("gpt2"), world=world)
        step = trainer.train_step

        def fail(*_: Any) -> None:
            raise RuntimeError("the model fails here")

        def fall() -> None:
            say_when(folder, world.rank)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))  # as if it were full
            else:
                trainer.model.transformer.h[1].register_forward_pre_hook(fail)  # after h.0's activations have left

        def train_step(batches, *counts) -> None:
            if trainer.step == 2 and world.rank == case["rank"]:
                fall()
            step(batches, *counts)

        trainer.train_step = train_step  # type: ignore[method-assign]
        try:
            trainer.fit(progress=False)
        except Exception as error:
            write(folder, world.rank, error)
            raise


def prepare(folder: Path, which: int) -> None:
    """Rank ``which`` fails at what the first rank does before the others, which wait for it as long as it takes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with joined("cpu") as world:
        try:
            with world.one_first():
                if world.rank == which:
                    time.sleep(0.5)  # the others are waiting, for the first rank or at what comes next
                    say_when(folder, world.rank)
                    raise OSError("no space left for the tokens")
            world.wait()
        except Exception as error:
            write(folder, world.rank, error)
            raise


def say_when(folder: Path, rank: int) -> None:
    (folder / "fell.json").write_text(json.dumps({"time": time.time(), "rank": rank}))


def write(folder: Path, rank: int, error: Exception) -> None:
    said = {"error": f"{type(error).__name__}: {error}", "time": time.time()}
    (folder / f"error-{rank}").write_text(json.dumps(said))
