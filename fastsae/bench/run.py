"""``fastsae bench``: how fast the kernels are here, beside plain torch and beside what the device can do.

Shapes: N tokens, D width, L latents, K active latents.

Every contestant must agree with a float64 truth before anything of its operation is timed; where one differs,
that operation gets no times. Contestants take turns, so that drift of the machine hits all alike. Times include
the call from Python as far as the device waits for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import ops
from ..devices import resolve_device
from ..errors import ArtifactError, ConfigError, first_line
from .cases import chosen_encoder, contestants
from .problem import Problem, make_problem
from .record import Row, device_name, environment, row_record, to_json, write_json
from .report import legend, remarks, shape_table
from .shapes import OPS, BenchConfig
from .timing import FULL, QUICK, Clock, Effort, clock_for, measure_peaks, time_rounds
from .truth import Verdict, judge, tolerance

SEED = 0


def measure(op: str, p: Problem, implementations: list[str], clock: Clock, effort: Effort) -> list[Row]:
    """Check every contestant of ``op`` against the truth, torch first; time all of them if none differs."""
    rows, runs = {}, {}
    chosen = chosen_encoder(p) if op == "encode" and "triton" in implementations else None
    prepared = contestants(op, p, implementations)
    by_torch = None
    for name in sorted(prepared, key=lambda name: name != "torch"):
        row = Row(op, name, chosen=name == chosen)
        try:
            runs[name] = prepared[name]()
            row = row._replace(verdict=judge(op, p, runs[name](), by_torch), peak_mib=clock.peak_mib(runs[name]))
        except torch.OutOfMemoryError as error:
            row = row._replace(skipped=first_line(error))
        except Exception as error:  # one contestant's trouble must not hide the others' results
            if name == "torch" or (name not in implementations and isinstance(error, ValueError)):
                row = row._replace(skipped=first_line(error))  # a dtype torch lacks, a shape that one path refuses
            else:
                row = row._replace(verdict=Verdict({}, f"raised {type(error).__name__}: {first_line(error)}"))
        by_torch = row.verdict if name == "torch" else by_torch
        rows[name] = row
    rows = [rows[name] for name in prepared]
    if any(row.difference for row in rows):
        return rows
    ready = {row.implementation: runs[row.implementation] for row in rows if row.verdict}
    times = time_rounds(clock, ready, effort)
    return [row._replace(times=times.get(row.implementation, ())) for row in rows]


def bench(cfg: BenchConfig) -> int:
    """Measure, print a table per shape, write the record; 0, or 1 where a contestant differed from the truth.

    Raises :class:`fastsae.FastsaeError` for what cannot be measured here.
    """
    device = _device(cfg.device)
    dtype = _dtype(cfg.dtype, device)
    shapes, implementations = cfg.shapes_for(device.type), _implementations(cfg, device)
    json_path = _json_path(cfg.json)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    notes = Console(stderr=True)
    console = notes if cfg.json == "-" else Console()

    notes.print("measuring the device's own peaks", highlight=False)
    clock = clock_for(device)
    peaks = measure_peaks(clock, device, dtype, cfg.quick)
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "implementations": implementations,
        "quick": cfg.quick,
        "seed": SEED,
        "tolerance": tolerance(dtype),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    record: dict[str, Any] = {
        **environment(device, torch.get_num_threads()),
        "settings": settings, "peaks": peaks._asdict(), "cases": [], "failed": False,
    }  # fmt: skip
    for shape in shapes:
        records: list[dict[str, Any]] = []
        for op, rows in _measure_shape(shape, dtype, device, implementations, clock, cfg.quick, notes):
            cost = OPS[op].cost(shape, dtype.itemsize)
            torch_times = next((row.times for row in rows if row.implementation == "torch"), ())
            records += [row_record(row, shape, cost, peaks, torch_times) for row in rows]
            record["failed"] |= any(row.difference for row in rows)
            if json_path is not None:
                write_json(json_path, record | {"cases": record["cases"] + records})
        record["cases"] += records
        console.print(shape_table(f"{shape}  {settings['dtype']}  {device_name(device)}", records))
        for line in remarks(records):
            console.print(line, style="dim", highlight=False, markup=False)
        console.print()
    console.print(legend(peaks, settings["dtype"]), style="dim", highlight=False)
    if cfg.json == "-":
        sys.stdout.write(to_json(record))
    if record["failed"]:
        notes.print("some results differ from the float64 truth: see above", style="bold red", highlight=False)
    return int(record["failed"])


@torch.no_grad()
def _measure_shape(shape, dtype, device, implementations, clock, quick, notes):
    """Pairs of an operation and its rows, as they are done."""
    try:
        p = make_problem(shape, dtype, device, SEED)
        _ = p.centered, p.best  # inputs and truth are made once, outside every measurement
    except torch.OutOfMemoryError as error:
        for op in OPS:
            yield op, [Row(op, name, skipped=first_line(error)) for name in implementations]
        return
    for op in OPS:
        notes.print(f"{shape.name} {op}", highlight=False)
        yield op, measure(op, p, implementations, clock, QUICK if quick else FULL)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _device(name: str | None) -> torch.device:
    if name is not None and name.startswith("mps"):
        raise ConfigError(f"device: expected cuda, cuda:N or cpu, got {name!r}")
    return resolve_device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _implementations(cfg: BenchConfig, device: torch.device) -> list[str]:
    """Without repeats, torch last: the others are compared with it."""
    names = []
    for name in cfg.implementations():
        resolved = name if name == "torch" else ops.resolve(name, device)
        if resolved == "triton" and device.type == "cpu":
            raise ConfigError("implementation 'triton' expects a GPU to be timed on, got cpu; try --implementation cpu")
        names.append(resolved)
    return [*dict.fromkeys(name for name in names if name != "torch"), "torch"]


def _json_path(name: str | None) -> Path | None:
    if name is None or name == "-":
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise ArtifactError(f"json: expected a file in a folder that exists, got {name!r}; make it with mkdir -p")
    return path
