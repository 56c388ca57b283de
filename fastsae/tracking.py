"""Where the numbers of a run go: always ``metrics.jsonl``; W&B and TensorBoard when asked for."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConfigError


class Tracker:
    """Writes one record per log interval to every destination."""

    def __init__(self, folder: Path, log_to: Sequence[str], config: dict[str, Any]):
        self._wandb = self._board = None
        if "wandb" in log_to:
            wandb = _import(*_PACKAGES["wandb"])
            with _without_access_token():
                self._wandb = wandb.init(project="fastsae", name=folder.name, config=config)
        if "tensorboard" in log_to:
            board = _import(*_PACKAGES["tensorboard"])
            self._board = board.SummaryWriter(str(folder / "tensorboard"))
        self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        with suppress(OSError):  # of a line that log could not write, and said so
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


class Silence:
    """A tracker of ranks that record nothing: rank 0 does."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def check_trackers(log_to: Sequence[str]) -> None:
    """Raise :class:`ConfigError` where a tracker's package is not installed: before any work, not after it."""
    for name in log_to:
        _import(*_PACKAGES[name])


@contextmanager
def _without_access_token() -> Iterator[None]:
    """The command line without the value of ``--hf-token``: W&B records it, and sends it away."""
    given, kept = sys.argv, []
    for word in given:
        hidden = kept[-1:] == ["--hf-token"]
        kept.append("hidden" if hidden else "--hf-token=hidden" if word.startswith("--hf-token=") else word)
    sys.argv = kept
    try:
        yield
    finally:
        sys.argv = given


_PACKAGES = {"wandb": ("wandb", "wandb"), "tensorboard": ("torch.utils.tensorboard", "tensorboard")}


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"log_to: expected the package {package!r} to log to {package}, it is not installed; pip install {package}"
        ) from None
