"""What one rank of ``tests/test_collectives.py`` does: an optimizer step by mode, and what it says to others in it.

The step is a run's second: the first one also starts biases and measures activations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import make_model, token_rows
from torch import Tensor

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.joining import joined
from fastsae.rows import MapRows

LENGTH, WIDTH, LATENTS, K = 8, 32, 66, 5
BATCHES = ((1, 2, 3, 1), (2, 0, 1, 2))
"""Rows that each rank has of a step's two batches."""

THREE = ("wte", "h.0", "h.1")
MODULES: dict[str, dict[str, Any]] = {
    "plain": {"hookpoints": THREE},
    "parts": {"hookpoints": THREE, "micro_acc_steps": 3},
    "bfloat16": {"hookpoints": THREE},
    "variants": {"hookpoints": ("h.1",), "init_seeds": (0, 1, 2, 3, 4, 5)},
    "transcoders": {"hookpoints": ("h.0.mlp", "h.1.mlp"), "sae": {"transcode": True}},
}
"""Runs with ``distribute_modules``; of the variants two ranks own two each."""

SPLIT: dict[str, dict[str, Any]] = {
    "plain": {"hookpoints": ("h.0", "h.1")},
    "parts": {"hookpoints": ("h.0", "h.1"), "micro_acc_steps": 3},
    "clipped": {"hookpoints": ("h.0", "h.1"), "max_grad_norm": 1.0},
    "bfloat16": {"hookpoints": ("h.0", "h.1")},
    "variants": {"hookpoints": ("h.1",), "init_seeds": (0, 1)},
    "replicas": {"hookpoints": ("h.0", "h.1"), "distribute_latents": 2},
    "replicas in parts": {"hookpoints": ("h.0", "h.1"), "distribute_latents": 2, "micro_acc_steps": 3},
}
"""Runs with ``distribute_latents``, over all ranks but for the replicas."""


class Said:
    """Calls by kind, the bytes that this rank gave to them, and the types of what it gave."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.dtypes: dict[str, set[str]] = {}
        self.active = 0  # latents that any replica has gradients of, over all coders

    def note(self, kind: str, tensor: Tensor) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += tensor.nbytes
        self.dtypes.setdefault(kind, set()).add(str(tensor.dtype).removeprefix("torch."))


@contextmanager
def listening() -> Iterator[Said]:
    """Everything of torch.distributed that the package calls, noted and done."""
    said = Said()

    def all_reduce(original: Callable, tensor: Tensor, *rest: Any, **options: Any) -> Any:
        said.note("all_reduce", tensor)
        done = original(tensor, *rest, **options)
        said.active += int((tensor > 0).sum()) if tensor.dtype == torch.uint8 else 0
        return done

    def all_gather(original: Callable, parts: list[Tensor], tensor: Tensor, **options: Any) -> Any:
        said.note("all_gather", tensor)
        return original(parts, tensor, **options)

    def batch_isend_irecv(original: Callable, operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            said.note(operation.op.__name__, operation.tensor)
        return original(operations)

    def other(original: Callable, *arguments: Any, **options: Any) -> Any:
        said.calls[original.__name__] += 1
        return original(*arguments, **options)

    heard = {"all_reduce": all_reduce, "all_gather": all_gather, "batch_isend_irecv": batch_isend_irecv}
    heard |= dict.fromkeys(
        ("barrier", "broadcast", "send", "recv", "all_gather_object", "broadcast_object_list", "all_to_all"), other
    )
    originals = {name: getattr(dist, name) for name in heard}
    try:
        for name, wrapper in heard.items():
            setattr(dist, name, lambda *args, _f=wrapper, _o=originals[name], **kw: _f(_o, *args, **kw))
        yield said
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(folder: Path, mode: str, name: str, changes: dict[str, Any], rank: int) -> None:
    sae = {"num_latents": LATENTS, "k": K, **changes.pop("sae", {})}
    cfg = TrainConfig(SaeConfig(**sae), batch_size=2, grad_acc_steps=2, **changes)
    model = make_model("gpt2").to(torch.bfloat16 if name == "bfloat16" else torch.float32)
    trainer = Trainer(cfg, token_rows(40, LENGTH), model)
    rows = MapRows(token_rows(9, LENGTH, seed=rank))
    batches = [rows.collate(rows.take(counts[rank])) for counts in BATCHES]
    trainer.train_step(batches)
    with listening() as said:
        trainer.train_step(batches)
    sums = {name: metrics.step_sums.numel() for name, metrics in trainer.metrics.items()}
    record = {
        "calls": said.calls, "bytes": said.bytes, "dtypes": {k: sorted(v) for k, v in said.dtypes.items()},
        "active": said.active, "sums": sums,
    }  # fmt: skip
    (folder / f"{mode} {name} {rank}.json").write_text(json.dumps(record))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for name, changes in MODULES.items():
            measure(folder, "modules", name, {"distribute_modules": True, **changes}, world.rank)
        for name, changes in SPLIT.items():
            measure(folder, "latents", name, {"distribute_latents": world.size, **changes}, world.rank)
