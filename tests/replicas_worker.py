"""What one rank of ``tests/test_replicas.py`` does."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.joining import joined
from fastsae.distributed.world import World

TOGETHER = 6  # sequences of a batch, over all ranks
CASES: dict[str, dict[str, Any]] = {
    "fvu": {"sae": SaeConfig(num_latents=64, k=4, multi_topk=True)},
    "ce": {"loss_fn": "ce"},
    "kl": {"loss_fn": "kl"},
    "adam8bit": {"optimizer": "adam8bit"},
    "signum": {"optimizer": "signum", "max_grad_norm": None},
    "muon": {"optimizer": "muon"},
    "bfloat16": {"grad_reduce_dtype": "bfloat16"},
}


def train(folder: Path, world: World, case: str, dataset: Any = None) -> Trainer:
    """A run whose last batch leaves a rank with fewer sequences, and whose ranks have other numbers of tokens."""
    options = {"sae": SaeConfig(num_latents=64, k=4), "max_grad_norm": 0.5, **CASES[case]}
    cfg = TrainConfig(
        hookpoints=("h.1",), batch_size=TOGETHER // world.size, lr=1e-2, grad_acc_steps=2,
        micro_acc_steps=world.size if options.get("loss_fn", "fvu") == "fvu" else 1,
        save_dir=str(folder), run_name=case, auxk_alpha=0.03, dead_feature_threshold=200,
        exclude_tokens=(3, 5, 7, 11), held_out=5, log_every=1, **options,
    )  # fmt: skip
    trainer = Trainer(cfg, token_rows(103, 8) if dataset is None else dataset, make_model("gpt2"), world=world)
    trainer.fit(progress=False)
    return trainer


def count_collectives(world: World, trainer: Trainer) -> dict[str, Any]:
    """What the ranks say to each other in one optimizer step of two batches in three chunks each."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "barrier")}
    try:
        for name, original in originals.items():
            setattr(dist, name, lambda *args, _n=name, _f=original, **kw: (calls.update([_n]), _f(*args, **kw))[1])
        before = world.sent
        rows = token_rows(4, 8, seed=world.rank)
        trainer.train_step([{"input_ids": rows[i : i + 2]["input_ids"]} for i in (0, 2)])
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"calls": dict(calls), "bytes": world.sent - before}


def main(folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    with joined() as world:
        for case in cases:
            trainer = train(folder, world, case)
            weights = {key: t.tolist() for key, t in trainer.coders["h.1"].state_dict().items()}
            record = {"tokens": trainer.tokens, "held_out": trainer.held_out_metrics()["h.1"], "weights": weights}
            (folder / f"{case}-{world.rank}.json").write_text(json.dumps(record))
            if case in ("fvu", "bfloat16"):
                counted = count_collectives(world, trainer)
                (folder / f"{case}-counted-{world.rank}.json").write_text(json.dumps(counted))
        places = {"rank": world.rank, "local_rank": world.local_rank, "local_size": world.local_size}
        places["environment"] = [int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK")]
        (folder / f"place-{world.rank}.json").write_text(json.dumps(places))
