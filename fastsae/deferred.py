"""Numbers of the device that the host gets without stopping it: how many latents are dead, and seconds.

Shapes: L latents, R dead ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


class DeadLatents:
    """Which latents are dead, without stopping the GPU: their number travels to the host while it works on."""

    def __init__(self, mask: Tensor, over_slices: Callable[[Tensor], Tensor]):  # bool [L]
        self._mask = mask
        self._counts = torch.stack([mask.sum(), over_slices(mask.sum())])  # here, and of the whole coder
        self._arrived: torch.cuda.Event | None = None
        self._ids: Tensor | None = None
        if mask.is_cuda:
            self._counts = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(self._counts, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def count(self) -> int:
        """How many of the whole coder's latents are dead."""
        if self._arrived is not None:
            self._arrived.synchronize()  # recorded a step ago: the GPU is past it, or the host is a step ahead
            self._arrived = None
        return int(self._counts[1])

    def ids(self) -> Tensor | None:  # [R] int64, ascending
        """The dead latents, of a slice those in it; None where the whole coder has none."""
        if self._ids is None and self.count():
            self._ids = torch.nonzero_static(self._mask, size=int(self._counts[0]))[:, 0]
        return self._ids


class Stopwatch:
    """Seconds spent in a ``with`` block, summed; on a GPU by events, so that nothing waits until it is read."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def read(self) -> float:
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self._seconds
