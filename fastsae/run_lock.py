"""One process at a time trains a run: a lock beside its training states, which the system frees when a process dies."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ArtifactError
from .training_state import STATE

logger = logging.getLogger("fastsae")

LOCK = "lock"


class RunLock:
    """Nobody's at first; :meth:`take` makes it this process's, of all ranks of a run only the first's."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def take(self, run: Path) -> None:
        """Raises :class:`ArtifactError` where another process trains ``run``; does nothing where it is ours already."""
        if self._lock is not None:
            return
        path = run / STATE / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire(blocking=False)
        except Timeout:
            raise ArtifactError(
                f"output: expected a run that nobody is training, but another process trains {run} right now; "
                "wait for it, or stop it (Ctrl-C saves), then --resume again"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): see to it that no other process trains this run", run, error)
            return
        self._lock = lock

    def free(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
