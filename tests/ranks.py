"""Ranks for tests: torchrun's own agent, in this process; its workers are forked off a server that has imported all.

A start takes a tenth of a second, where torchrun and ``python`` take seconds of imports for every process.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

IMPORTED = ["torch", "datasets", "transformers.models.gpt2.modeling_gpt2", "fastsae.trainer", "fastsae.muon"]


def launch_ranks(ranks: int, work: Callable[..., None], *arguments: Any, **config: Any) -> None:
    """``work(*arguments)``, a function of a module beside this one, in ``ranks`` processes under torchrun's agent.

    Raises what the agent raises where a rank fails: the rank, its exit code, its traceback.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    alone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "min_nodes": 1, "max_nodes": 1}
    options = {**alone, "run_id": str(uuid.uuid4()), "max_restarts": 0, **config}
    with _handlers_kept():
        elastic_launch(LaunchConfig(nproc_per_node=ranks, start_method="forkserver", **options), work)(*arguments)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The agent puts handlers of its own for signals, and leaves them."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    kept = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(numbers, kept, strict=True):
                signal.signal(number, handler)
