"""Ctrl-C and SIGTERM while a run trains: the step is finished and saved first; a second signal acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by ``signum``, after it saved; the message says how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """Inside the block the first signal only shows in ``received``; handlers are put back at its end.

    A second signal acts at once, unless ``again`` is False: whoever sends it twice will kill in the end. Only a
    process's main thread can do this: elsewhere nothing is received.
    """

    def __init__(self, again: bool = True) -> None:
        self.received: int | None = None
        self._again = again
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signum
        if self._again:
            self.__exit__()
