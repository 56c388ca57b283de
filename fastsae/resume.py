"""Going on with a run: the options that must be the run's own, and the records that a later crash left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import ArtifactError, ConfigError

FREE = {
    "save_every", "keep_last", "save_best", "log_every", "log_to", "micro_acc_steps", "implementation", "save_dir",
    "run_name", "finetune", "distribute_modules", "distribute_latents", "activations",
}  # fmt: skip
"""Fields of :class:`TrainConfig` that may differ from the run's start: they change no number beyond rounding."""

FREE_OPTIONS = (FREE - {"save_dir", "run_name", "finetune"}) | {
    "device", "hf_token", "data_preprocessing_num_proc", "batch_size",
}  # fmt: skip
"""What may be given on the command line beside --resume."""


def check_same_run(cfg: TrainConfig, state: dict[str, Any], processes: int = 1) -> None:
    """Raise :class:`ConfigError` where ``cfg`` is not what the run of this training state was told to do.

    Another number of ``processes`` may go on with it, on batches of as many sequences in all.
    """
    began = state["config"]
    now = json.loads(json.dumps(cfg.to_dict()))
    before = state.get("processes", 1)
    if (batch := began["batch_size"] * before) != cfg.batch_size * processes:
        way_out = f"give --batch-size {batch // processes}" if batch % processes == 0 else "start a divisor of it"
        raise ConfigError(
            f"resume: expected batches of {batch} sequences over all processes, as the run had ({before} times "
            f"{began['batch_size']}), got {processes} times {cfg.batch_size}; {way_out}"
        )
    for key in now.keys() - FREE - {"batch_size"}:
        for name, value, expected in _fields(key, now[key], began.get(key)):
            if value != expected:
                raise ConfigError(f"resume: expected {name} = {expected!r}, as the run started with, got {value!r}")


def _fields(key: str, value: Any, expected: Any) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(value, dict) and isinstance(expected, dict):
        return [(name, item, expected.get(name)) for name, item in value.items()]
    return [(key, value, expected)]


def check_resume_options(given: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for options that would make it another run."""
    if changed := sorted(set(given) - FREE_OPTIONS):
        raise ConfigError(
            f"resume: expected no --{changed[0].replace('_', '-')}, a resumed run goes on with its own options; "
            f"leave it out (these may be given: {', '.join(sorted(FREE_OPTIONS))})"
        )


def run_config_file(run: Path | str) -> Path:
    """A run's config.json; raises :class:`ArtifactError` where there is none."""
    path = Path(run).expanduser() / "config.json"
    if not path.is_file():
        raise ArtifactError(f"resume: expected a run's folder with config.json, got {str(run)!r}, which has none")
    return path


def rewind_metrics(run: Path, step: int) -> None:
    """Drop the records of metrics.jsonl after ``step``, and a last line that a crash cut off: they come again."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    beside = path.with_name(f"{path.name}.part")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)
