"""Clocks: interleaved rounds, peak memory, and the peaks a device really reaches."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
FLUSH_BYTES = 512 * 2**20  # several times the L2 of any GPU


class Effort(NamedTuple):
    """How long to measure."""

    seconds: float
    """Aimed at for one operation, all contestants together."""
    least: int
    """Rounds at least."""
    most: int
    """Rounds at most."""


FULL, QUICK = Effort(6.0, 7, 50), Effort(0.5, 5, 20)


class Clock(Protocol):
    """Times and weighs calls on one device."""

    def ms(self, call: Call) -> float:
        """Milliseconds of one call."""
        ...

    def peak_mib(self, call: Call) -> float | None:
        """Most memory in use during a call beyond what was in use before it, results included; None: not known."""
        ...


class GpuClock:
    """CUDA events. L2 is overwritten before each call, which also lets the host run ahead of the GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def ms(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    def peak_mib(self, call: Call) -> float | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


class CpuClock:
    """Wall-clock time; memory is the process's resident set, on Linux with glibc."""

    def ms(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def peak_mib(self, call: Call) -> float | None:
        try:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else a call could reuse freed memory unseen
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM, see proc(5)
            before = _resident_kib("VmRSS")
            call()
            return (_resident_kib("VmHWM") - before) / 1024
        except (OSError, AttributeError):
            return None


def clock_for(device: torch.device) -> Clock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()


def _resident_kib(field: str) -> int:
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(match[1])


def time_rounds(clock: Clock, calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Milliseconds of every call in every round: A B C, B C A, ... so that drift of the machine hits all alike."""
    names = list(calls)
    once = sum(min(clock.ms(calls[name]) for _ in range(2)) for name in names)  # warm-up, thrown away
    rounds = min(effort.most, max(effort.least, int(1e3 * effort.seconds / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(clock.ms(calls[name]))
    return times


def percentile(times: Sequence[float], percent: int) -> float:
    """Interpolated between the values measured, never outside them."""
    return quantiles(times, n=100, method="inclusive")[percent - 1] if len(times) > 1 else times[0]


class Peaks(NamedTuple):
    """The fastest matrix product and copy measured here and now."""

    gemm_flops: float
    """FLOP/s of a square ``torch.matmul`` in the measured dtype."""
    copy_bytes: float
    """Bytes/s read and written by ``Tensor.copy_``."""
    gemm_size: int
    copy_size: int
    gemm_ms: list[float]
    copy_ms: list[float]


def measure_peaks(clock: Clock, device: torch.device, dtype: torch.dtype, quick: bool) -> Peaks:
    """Bounds are stated against these, not against a data sheet."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 512 if quick else 2048
    size = 2**30 if gpu else 2**25 if quick else 2**29
    effort = QUICK if quick else Effort(2.0, 7, 50)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = time_rounds(clock, {"gemm": lambda: torch.matmul(a, b, out=out)}, effort)["gemm"]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_rounds(clock, {"copy": lambda: target.copy_(source)}, effort)["copy"]
    return Peaks(2 * n**3 / (1e-3 * min(gemm)), 2 * size / (1e-3 * min(copy)), n, size, gemm, copy)
