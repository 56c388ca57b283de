"""What ``fastsae bench`` prints: a table for eyes, of the records of :mod:`.record`."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from .shapes import OPS
from .timing import Peaks


def shape_table(title: str, records: list[dict[str, Any]]) -> Table:
    """The records of one shape in 80 columns; what failed its check says so in place of a time."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("op", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "p10–p90", "speed", "MiB", "vs torch", "vs bound"):
        table.add_column(column, justify="right", no_wrap=True)
    before = None
    for record in records:
        op, before = "" if record["op"] == before else record["op"], record["op"]
        name = record["implementation"] + ("*" if record["chosen"] else "")
        if record["ms"] is None:
            table.add_row(op, name, "-", *_why_untimed(record))
            continue
        ratio = record["ratio_to_torch"]
        table.add_row(
            op, name, _digits(record["ms"]), f"{_digits(record['p10_ms'])}–{_digits(record['p90_ms'])}",
            _speed(record),
            "-" if record["peak_mib"] is None else f"{record['peak_mib']:.0f}",
            "-" if ratio is None else _ratio(ratio), _ratio(record["ratio_to_bound"]),
        )  # fmt: skip
    return table


def _speed(record: dict[str, Any]) -> str:
    if OPS[record["op"]].unit == "GB/s":
        return f"{_digits(record['gb_s'])} GB/s"
    return _flops(record["tflops"])


def _flops(tera: float) -> str:
    return f"{_digits(tera)} TFLOP/s" if tera >= 1 else f"{_digits(1e3 * tera)} GFLOP/s"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def _why_untimed(record: dict[str, Any]) -> tuple[str, ...]:
    return ("differs",) if record["difference"] else ("skipped",) if record["skipped"] else ("untimed",)


def remarks(records: list[dict[str, Any]]) -> list[str]:
    """What does not fit the table's cells: what differed, what did not run, how exact the selections are."""
    lines = []
    for record in records:
        reason = record["difference"] or record["skipped"]
        if reason:
            word = "differs" if record["difference"] else "skipped"
            lines.append(f"{record['op']}, {record['implementation']} {word}: {reason}")
    exact = [r for r in records if r["op"] == "encode" and r["exact_sets"] is not None]
    if exact:
        shares = ", ".join(f"{r['implementation']} {100 * r['exact_sets']:.1f} %" for r in exact)
        lines.append(f"tokens with the exact float64 set: {shares}")
    if any(r["chosen"] for r in records):
        lines.append("* what implementation triton takes by itself")
    if any(r["ms"] is not None and r["peak_mib"] is None for r in records):
        lines.append("MiB -: this system does not tell a process's peak memory (needs Linux and glibc)")
    return lines


def legend(peaks: Peaks, dtype: str) -> str:
    return (
        f"MiB: memory beyond the inputs. vs torch: torch's time over this one, larger is faster. vs bound: time over "
        f"the least possible, FLOPs at the {_flops(peaks.gemm_flops / 1e12)} measured for torch.matmul in "
        f"{dtype} plus bytes at the {_digits(peaks.copy_bytes / 1e9)} GB/s measured for a copy."
    )


def _digits(number: float) -> str:
    """Three significant digits, at most three of them decimals: 80 columns hold no more."""
    return f"{number:.{min(3, max(0, 2 - math.floor(math.log10(number))))}f}" if number > 0 else "0"
