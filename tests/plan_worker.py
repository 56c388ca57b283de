"""What one rank of ``tests/test_plan_modes.py`` does, under torchrun: the bytes that its second step sends, by mode."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.joining import joined

MODES = {
    "": {},
    "--distribute-modules": {"distribute_modules": True},
    "--distribute-latents 2": {"distribute_latents": 2},
}
CASES = {
    "autoencoders": {"sae": SaeConfig(num_latents=40, k=8), "hookpoints": ("h.0", "h.1", "h.2")},
    "transcoders": {
        "sae": SaeConfig(num_latents=40, k=8, transcode=True),
        "hookpoints": ("h.*.mlp",),
        "grad_acc_steps": 2,
    },
}
ROWS, LENGTH = 48, 16


def config(case: str, mode: str) -> TrainConfig:
    return TrainConfig(**{**CASES[case], **MODES[mode], "batch_size": 4, "held_out": 0})  # type: ignore[arg-type]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sent = {}
    with joined() as world:
        for case in CASES:
            for mode in MODES:
                trainer = Trainer(config(case, mode), token_rows(ROWS, LENGTH), make_model("gpt2"), world=world)
                steps = trainer._steps()
                trainer.train_step(next(steps)[0])
                before = world.sent
                trainer.train_step(next(steps)[0])
                sent[f"{case} {mode}"] = world.sent - before
                steps.close()  # type: ignore[attr-defined]
        (folder / f"rank{world.rank}.json").write_text(json.dumps(sent))
