"""What ``fastsae bench`` writes: everything measured, with where and with what."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from ..version import __version__
from .shapes import Cost, Shape
from .timing import Peaks, percentile
from .truth import Verdict


class Row(NamedTuple):
    """One contestant of one operation on one shape."""

    op: str
    implementation: str
    verdict: Verdict | None = None
    """None where it did not run."""
    skipped: str | None = None
    """Why it did not run."""
    times: Sequence[float] = ()
    """Milliseconds, every round; none where anything of this operation failed its check."""
    peak_mib: float | None = None
    chosen: bool = False
    """Whether implementation auto takes this one where there are several of its kind."""

    @property
    def difference(self) -> str | None:
        return self.verdict.difference if self.verdict else None


def row_record(row: Row, shape: Shape, cost: Cost, peaks: Peaks, torch_times: Sequence[float]) -> dict[str, Any]:
    """Everything known about a row; speeds and ratios only where it was timed."""
    verdict = row.verdict
    record: dict[str, Any] = {
        "shape": shape._asdict(),
        "op": row.op,
        "implementation": row.implementation,
        "chosen": row.chosen,
        "skipped": row.skipped,
        "agrees": verdict is not None and verdict.difference is None,
        "difference": row.difference,
        "errors": {name: error if math.isfinite(error) else str(error) for name, error in verdict.errors.items()}
        if verdict
        else None,
        "limits": verdict.limits if verdict else None,
        "exact_sets": verdict.exact_sets if verdict else None,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "bound_ms": cost.bound_ms(peaks.gemm_flops, peaks.copy_bytes),
        "peak_mib": row.peak_mib,
    }
    timed = ("ms", "p10_ms", "p90_ms", "tflops", "gb_s", "ratio_to_bound", "ratio_to_torch")
    record |= dict.fromkeys(timed) | {"times_ms": list(row.times)}
    if row.times:
        ms = median(row.times)
        record |= {
            "ms": ms,
            "p10_ms": percentile(row.times, 10),
            "p90_ms": percentile(row.times, 90),
            "tflops": cost.flops / ms / 1e9,
            "gb_s": cost.bytes / ms / 1e6,
            "ratio_to_bound": ms / record["bound_ms"],
            "ratio_to_torch": median(torch_times) / ms if torch_times else None,
        }
    return record


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Where and with what the measurement was made."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_checkout(),
        "device": {"type": device.type, "name": device_name(device), "threads": threads},
        "versions": {
            "fastsae": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write beside the file, then rename: an interrupted run leaves the last whole record."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(to_json(record))
    beside.replace(path)


def to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _checkout() -> dict[str, Any]:
    """The git commit of these very files, and whether tracked files differ from it; None when installed."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "record.py") is None:
        return {"commit": None, "modified": None}
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
