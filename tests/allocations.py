"""What torch's CPU allocator hands out, counted by torch's own profiler: exact, and the same on every machine."""

import gc
from collections.abc import Callable
from typing import Any

from fastsae_kernels import cpu_screen
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once while ``work`` runs, beyond those alive before."""
    vars(cpu_screen._memory).clear()  # scratch that an earlier call left
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
