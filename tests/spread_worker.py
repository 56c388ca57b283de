"""What one rank of ``tests/test_spread.py`` does.

Runs are written to ``FOLDER``; the test compares them with a single process's.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from models import make_model, token_rows

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.joining import joined

ROWS, LENGTH, BATCH = 51, 5, 12
EXACT = ("wte", "h.0.ln_1")  # their activations do not depend on what else is in the batch, to the bit

MODULES: dict[str, dict[str, Any]] = {
    "coders": {"set": ("wte:k=4|5",), "init_seeds": (0, 1)},
    "accumulated": {
        "grad_acc_steps": 2,
        "micro_acc_steps": 2,
        "optimizer": "adam8bit",
        "hookpoints": ("h.0.ln_1",),
        "token_buffer": 40,
    },
    "signum": {"optimizer": "signum", "max_grad_norm": None, "save_best": True, "keep_last": 2},
    "batchtopk": {"sae": {"activation": "batchtopk", "matryoshka_widths": (9,)}},
}
"""Runs with ``distribute_modules``."""

LATENTS: dict[str, dict[str, Any]] = {
    "adam": {},
    "multi": {"sae": {"multi_topk": True}, "optimizer": "adam8bit", "max_grad_norm": 0.1, "k_decay_steps": 4},
    "signum": {"optimizer": "signum", "grad_acc_steps": 2, "micro_acc_steps": 2},
    "groupmax": {"sae": {"activation": "groupmax", "num_latents": 70}, "hookpoints": ("wte",)},
    "replicas": {"ranks": 2},
}
"""Runs with ``distribute_latents``, over all ranks but for ``ranks``."""

TRANSCODER = {"sae": {"transcode": True, "skip_connection": True}, "hookpoints": ("h.0.mlp.c_fc",)}  # two widths


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the only coder, by parameter, in the first step. (b_dec starts at the mean: Adam makes steps of rounding.)"""
    found: dict[str, torch.Tensor] = {}
    reduce = trainer._strategy.reduce

    def reduce_and_keep(coders: Any, metrics: Any) -> None:
        reduce(coders, metrics)
        (coder,) = coders.values()
        found.update({name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None})

    trainer._strategy.reduce = reduce_and_keep
    trainer.train_step(next(iter(trainer._steps()))[0])
    return found


class Stop(Exception):
    """The end of a run that is to be gone on with."""


def make_trainer(folder: Path, name: str, batch: int = BATCH, **changes: Any) -> Trainer:
    """A run in ``folder/name``; ``batch`` sequences a process."""
    sae = {"num_latents": 67, "k": 5, **changes.pop("sae", {})}
    fields = {
        "hookpoints": EXACT, "auxk_alpha": 1 / 32, "dead_feature_threshold": 60, "exclude_tokens": tuple(range(1500)),
        "held_out": 2, "log_every": 1, "save_every": 2, **changes,
    }  # fmt: skip
    cfg = TrainConfig(SaeConfig(**sae), batch_size=batch, save_dir=str(folder), run_name=name, **fields)
    return Trainer(cfg, token_rows(ROWS, LENGTH), make_model("gpt2"))


def stop_after(trainer: Trainer, step: int) -> None:
    """Have :meth:`Trainer.fit` fail after ``step``, on every rank."""
    log = trainer._log

    def logged(*arguments: Any) -> None:
        log(*arguments)
        if trainer.step == step:
            raise Stop

    trainer._log = logged


def meet(folder: Path, trainer: Trainer, ranks: int) -> None:
    """Have coders trained only when those of all ranks are about to be: if they took turns, none ever would."""
    train = trainer._train_hookpoint

    def train_together(*arguments: Any) -> None:
        (folder / f"{trainer.step}-{trainer.world.rank}").touch()
        deadline = time.monotonic() + 60
        while len(list(folder.glob(f"{trainer.step}-*"))) < ranks:
            assert time.monotonic() < deadline, "coders of other ranks do not train at the same time"
            time.sleep(0.005)
        train(*arguments)

    trainer._train_hookpoint = train_together


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        batch = BATCH // world.size
        for name, changes in MODULES.items():
            make_trainer(folder, f"modules-{name}", batch, distribute_modules=True, **changes).fit(progress=False)
        for name, changes in LATENTS.items():
            ranks = changes.pop("ranks", world.size)
            make_trainer(folder, f"latents-{name}", batch, distribute_latents=ranks, **changes).fit(progress=False)
        transcoder = make_trainer(folder, "transcoder", batch, distribute_latents=2, max_grad_norm=1e9, **TRANSCODER)
        torch.save(first_gradients(transcoder), folder / f"gradients-{world.rank}.pt")

        together = make_trainer(
            folder, "together", batch, distribute_modules=True, hookpoints=("wte", "h.0.ln_1", "h.1.ln_1", "h.2.ln_1")
        )
        meet(folder, together, world.size)
        together.fit(progress=False)
        resume(folder, world, batch)


def resume(folder: Path, world: Any, batch: int) -> None:
    """Stop in the middle, and go on: here, and, of a copy, in the test with another number of ranks."""
    for name, mode in {"modules": {"distribute_modules": True}, "latents": {"distribute_latents": world.size}}.items():
        options = {**mode, "optimizer": "adam8bit"}
        whole = make_trainer(folder, f"whole-{name}", batch, **options)
        whole.fit(progress=False)
        first = make_trainer(folder, f"stopped-{name}", batch, **options)
        stop_after(first, 3)
        try:
            first.fit(progress=False)
        except Stop:
            world.wait()
        if world.first:
            shutil.copytree(folder / f"stopped-{name}", folder / f"copied-{name}")
        world.wait()
        again = make_trainer(folder, f"stopped-{name}", batch, **options)
        again.resume(folder / f"stopped-{name}")
        assert again.step == 2
        again.fit(progress=False)
