"""The folder of a run: its name, and whether it can be written, found out before training starts."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import TrainConfig
from .errors import ArtifactError


def create_run_folder(cfg: TrainConfig, model_name: str) -> Path:
    """Make ``save_dir/run_name`` and return it; raises :class:`ArtifactError` if it is taken or not writable.

    Without a ``run_name``, runs that begin in the same second get names of their own.
    """
    name = cfg.run_name or default_name(model_name)
    if Path(name).name != name:
        raise ArtifactError(
            f"run_name: expected one folder name inside --save-dir, got {name!r}; use --save-dir for paths"
        )
    folder = Path(cfg.save_dir) / name
    if cfg.run_name and folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError(
            f"output: expected a new or empty folder, {folder} already holds files; choose another --run-name, "
            f"or go on with a run that was stopped: fastsae train --resume {folder}"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if cfg.run_name:
            folder.mkdir(exist_ok=True)
        else:
            folder = _make_new(folder)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArtifactError(
            f"output: expected a folder that can be written, got {folder}: {os.strerror(error.errno or 0)}; "
            "choose another --save-dir"
        ) from None
    return folder


def _make_new(folder: Path) -> Path:
    """Make a folder of this name, or where there is one of it with ``-2``, ``-3``, ... behind it."""
    made, count = folder, 1
    while True:
        try:
            made.mkdir()
            return made
        except FileExistsError:
            count += 1
            made = folder.with_name(f"{folder.name}-{count}")


@contextmanager
def claimed_run_folder(cfg: TrainConfig, model_name: str) -> Iterator[Path]:
    """The run's folder, made and found writable; a start that fails inside the block leaves nothing behind.

    What holds a coder or a line of metrics is a run, and stays.
    """
    parent_is_new = not Path(cfg.save_dir).exists()
    folder = create_run_folder(cfg, model_name)
    try:
        yield folder
    except BaseException:
        metrics = folder / "metrics.jsonl"
        if not any(folder.rglob("*.safetensors")) and not (metrics.is_file() and metrics.stat().st_size):
            shutil.rmtree(folder, ignore_errors=True)
            if parent_is_new:
                with suppress(OSError):  # holds other runs by now
                    Path(cfg.save_dir).rmdir()
        raise


def default_name(model_name: str) -> str:
    """``gpt2-20260131-235959``: the model's last name and the local time."""
    last = re.sub(r"[^\w.-]+", "-", Path(model_name).name) or "run"
    return f"{last}-{time.strftime('%Y%m%d-%H%M%S')}"
