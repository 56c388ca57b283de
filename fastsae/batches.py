"""What a training step needs of a batch: ids on the device, which tokens count, and how many, known to the host.

Shapes: B sequences, S tokens each, N tokens that count.

Everything that decides about tokens is computed on the CPU, where the ids are: no step waits for the GPU to learn
how many tokens are left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .errors import ArtifactError

Item = TypeVar("Item")


class ModelBatch(NamedTuple):
    """A batch, ready for the model."""

    ids: Tensor  # [B, S] int64, on the device
    attention_mask: Tensor | None  # [B, S], on the device
    positions: Tensor | None  # [N] int64, on the device: which of the B · S tokens count; None: all
    tokens: int  # N


def prepare(
    batch: dict[str, Tensor],  # input_ids [B, S], perhaps attention_mask and counts [B, S], on the CPU
    excluded: Tensor,  # token ids that do not count
    vocabulary: int,
    device: torch.device,
) -> ModelBatch:
    """Check ids against the vocabulary, drop padding and excluded tokens, and send what is needed on its way.

    Raises :class:`ArtifactError` for ids that the model does not have.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    counts = counted(batch, excluded)
    if ids.numel() and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ArtifactError(
            f"dataset: expected token ids from 0 to {vocabulary - 1}, got {ids.min()} to {ids.max()}; "
            "was it tokenised for another model?"
        )
    positions = None if counts is None else counts.flatten().nonzero()[:, 0]

    def send(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or device.type != "cuda":
            return None if tensor is None else tensor.to(device)
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)

    ids_there = send(ids)
    assert ids_there is not None
    return ModelBatch(ids_there, send(mask), send(positions), ids.numel() if positions is None else len(positions))


def counted(batch: dict[str, Tensor], excluded: Tensor) -> Tensor | None:
    """Which tokens are trained on, bool [B, S]; None: all."""
    masks = [batch[key].bool() for key in ("attention_mask", "counts") if key in batch]
    if len(excluded):
        masks.append(torch.isin(batch["input_ids"], excluded, invert=True))
    return reduce(torch.logical_and, masks) if masks else None


def prefetched(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The items, made by a thread that stays up to ``depth`` ahead; its exceptions arrive here, in their place."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[str, object]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=produce, daemon=True, name="fastsae-prefetch")
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()
