"""What one rank of ``tests/test_replicas.py`` does, under torchrun: ``replicas_worker.py FOLDER LOSS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.world import World, joined

TOGETHER = 6  # sequences of a batch, over all ranks


def train(folder: Path, world: World, loss_fn: Any) -> Trainer:
    """A run whose last batch leaves a rank with fewer sequences, and whose ranks have other numbers of tokens."""
    end_to_end = loss_fn != "fvu"
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4, multi_topk=not end_to_end), loss_fn=loss_fn, hookpoints=("h.1",),
        batch_size=TOGETHER // world.size, micro_acc_steps=1 if end_to_end else world.size, lr=1e-2, grad_acc_steps=2,
        save_dir=str(folder), run_name="run", auxk_alpha=0.03, dead_feature_threshold=200,
        exclude_tokens=(3, 5, 7, 11), max_grad_norm=0.5, held_out=5, log_every=1,
    )  # fmt: skip
    trainer = Trainer(cfg, token_rows(103, 8), make_model("gpt2"), world=world)
    trainer.fit(progress=False)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined() as world:
        trainer = train(folder, world, sys.argv[2])
        weights = {key: t.tolist() for key, t in trainer.coders["h.1"].state_dict().items()}
        record = {"tokens": trainer.tokens, "held_out": trainer.held_out_metrics()["h.1"], "weights": weights}
        (folder / f"rank{world.rank}.json").write_text(json.dumps(record))
