"""What one rank of ``tests/test_rank_rows.py`` does: runs on rows that say their own number, and lists of these.

Shapes: B rows in a rank's part of a batch, S tokens in a row; row i of the data is S times token i + 1.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from models import make_model
from transformers import AutoTokenizer, GPT2Config

from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer
from fastsae.data import load_tokens
from fastsae.distributed.joining import joined

LENGTH = 4
TOGETHER = 6  # rows of a batch, over all ranks
KINDS: dict[str, dict[str, Any]] = {
    "map": {},
    "stream": {"streaming": True, "shuffle_buffer": 8},
    "short": {"streaming": True, "shuffle_buffer": 8, "max_examples": 60},
    "memmap": {},
}
"""Options by kind of data; a short stream ends before its limit."""

MODES: dict[str, dict[str, Any]] = {
    "replicas": {},
    "modules": {"distribute_modules": True},
    "latents": {"distribute_latents": True},
}
Case = tuple[str, int, str]
"""(kind, rows of the data, mode)"""

CASES: list[Case] = [
    ("map", 38, "replicas"),
    ("map", 38, "modules"),
    ("map", 40, "latents"),
    ("map", 43, "replicas"),
    ("stream", 38, "replicas"),
    ("stream", 44, "replicas"),
    ("short", 38, "replicas"),
    ("memmap", 38, "replicas"),
]
RESUMED: list[Case] = [
    ("map", 40, "replicas"),
    ("stream", 40, "replicas"),
    ("short", 40, "latents"),
    ("memmap", 40, "modules"),
]


class Stop(Exception):
    """The end of a run that is to be gone on with."""


def write_data(folder: Path) -> None:
    """The same rows as a folder of three files and as a flat file with half a row behind them, of every length."""
    for count in {rows for _, rows, _ in (*CASES, *RESUMED)}:
        ids = np.repeat(np.arange(1, count + 1, dtype=np.uint16)[:, None], LENGTH, 1)
        (folder / str(count)).mkdir()
        for number, part in enumerate(np.array_split(ids, 3)):
            Dataset.from_dict({"input_ids": part.tolist()}).to_parquet(folder / str(count) / f"{number}.parquet")
        np.append(ids.flatten(), ids[-1, : LENGTH // 2]).tofile(folder / f"{count}.bin")


def load_rows(data: Path, kind: str, rows: int) -> Any:
    """As a run would."""
    run = RunConfig(device="cpu", ctx_len=LENGTH, **{"max_examples": rows, **KINDS[kind]})
    name = str(data / (f"{rows}.bin" if kind == "memmap" else str(rows)))
    return load_tokens(name, run, AutoTokenizer.from_pretrained, GPT2Config())  # which is not called: there are ids


def name_of(case: Case) -> str:
    return " ".join(map(str, case))


class Recorder:
    """Which rows the model sees: of every step, of every batch in it; and when the held-out rows are measured."""

    def __init__(self, trainer: Trainer, stop_after: int = 0):
        self.trainer, self.steps, self.held_out, self._stop = trainer, [], [], stop_after
        self._train, self._seen = trainer.train_step, self.held_out
        trainer.train_step = self._train_step  # type: ignore[method-assign]
        trainer.model.base_model.register_forward_pre_hook(self._see, with_kwargs=True)  # type: ignore[union-attr]

    def _train_step(self, batches: Any, counts: Any = None) -> None:
        self._seen = []
        self.steps.append(self._seen)
        self._train(batches, counts)
        self._seen = self.held_out
        if self.trainer.step == self._stop:
            raise Stop

    def _see(self, _module: Any, arguments: tuple, options: dict[str, Any]) -> None:
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        assert (ids == ids[:, :1]).all()
        self._seen.append([] if not ids.any() else (ids[:, 0] - 1).tolist())  # token 0: a batch of nothing

    def record(self) -> dict[str, Any]:
        trainer = self.trainer
        return {"steps": self.steps, "held_out": self.held_out, "step": trainer.step, "tokens": trainer.tokens}


def make_trainer(folder: Path, data: Path, case: Case, ranks: int, run: str = "") -> Trainer:
    kind, rows, mode = case
    options = {key: ranks if key == "distribute_latents" else value for key, value in MODES[mode].items()}
    cfg = TrainConfig(
        SaeConfig(num_latents=16, k=2), hookpoints=("h.0", "h.1"), batch_size=TOGETHER // ranks,
        grad_acc_steps=2, save_every=2, save_dir=str(folder), run_name=run or name_of(case), **options,
    )  # fmt: skip
    return Trainer(cfg, load_rows(data, kind, rows), make_model("gpt2"))


def main(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True)  # ranks that wait for each other
    logging.getLogger("fastsae").setLevel(logging.ERROR)
    with joined("cpu") as world:
        for case in CASES:
            recorder = Recorder(make_trainer(folder, data, case, world.size))
            recorder.trainer.fit(progress=False)
            write(folder, "whole", case, world.rank, recorder)
        for case in RESUMED:
            run = f"stopped {name_of(case)}"
            recorder = Recorder(make_trainer(folder, data, case, world.size, run), stop_after=3)
            try:
                recorder.trainer.fit(progress=False)
            except Stop:
                world.wait()
            write(folder, "stopped", case, world.rank, recorder)
            if world.first:
                shutil.copytree(folder / run, folder / f"copied {name_of(case)}")
            world.wait()
            recorder = Recorder(make_trainer(folder, data, case, world.size, run))
            recorder.trainer.resume(folder / run)
            recorder.trainer.fit(progress=False)
            write(folder, "resumed", case, world.rank, recorder)


def write(folder: Path, what: str, case: Case, rank: int, recorder: Recorder) -> None:
    (folder / f"{what} {name_of(case)} {rank}.json").write_text(json.dumps(recorder.record()))
