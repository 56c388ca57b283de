"""``--measure``: how fast this machine takes a run's steps, with random weights and tokens."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..devices import resolve_device
from ..errors import ConfigError
from ..model import empty_model
from ..run_config import RunConfig
from ..train_step import StepTrainer
from .memory import Situation
from .result import Memory, Speed

STEPS = 2


def measured_speed(model: str, run: RunConfig, s: Situation, memory: Memory) -> Speed:
    """Of steps like the run's, after one to warm up; nothing is written.

    Raises :class:`ConfigError` where the run has several processes, or would not fit here.
    """
    if s.layout.ranks > 1:
        raise ConfigError(f"measure: expected one process, got --ranks {s.layout.ranks}; leave one of them out")
    if memory.fits is False:
        raise ConfigError("measure: expected a run that fits into memory, got one that does not; see the plan without")
    device = resolve_device(run.device)
    language_model = empty_model(model, run, s.work.dtype, with_head=s.cfg.loss_fn != "fvu").to(device)  # type: ignore[arg-type]
    rows = _Rows(4 * s.cfg.batch_size, s.tokens, language_model.config.get_text_config().vocab_size)
    trainer = StepTrainer(s.cfg, rows, language_model)
    batches = [{"input_ids": rows.ids[: s.cfg.batch_size]}] * s.cfg.grad_acc_steps
    trainer.train_step(batches)
    _wait(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        trainer.train_step(batches)
    _wait(device)
    tokens = STEPS * s.cfg.grad_acc_steps * s.cfg.batch_size * s.tokens
    return Speed(tokens / (time.perf_counter() - start), f"{STEPS} steps measured on this machine, random weights")


class _Rows:
    """Random tokens that count."""

    def __init__(self, count: int, length: int, vocabulary: int):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
