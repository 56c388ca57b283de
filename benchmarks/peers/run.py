"""fastsae beside its peers: time, memory and quality of one training step, in one run and one environment.

    python benchmarks/peers/run.py                     # the CPU cases
    python benchmarks/peers/run.py --device cuda       # the GPU cases
    python benchmarks/peers/run.py --cases C1 --json out.json
    python benchmarks/peers/run.py --no-screen         # as on a CPU whose bfloat16 products are not fast

Every library trains on the same batches in turn (A B C D, B C D A, ...), so that drift of the machine hits all
alike. Peak memory is a library's own: on a CPU that of a process for it alone, on a GPU what its tensors and one of
its steps take of torch's allocator. Quality is FVU on held-out tokens, float64 sums, after the same tokens. Needs
``benchmarks/peers/requirements.txt``; a library that is missing is named, not skipped in silence.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import PACKAGES, Contestant, Setting, make
from data import embedded, synthetic
from fastsae_kernels import cpu_screen
from torch import Tensor

CASES = {  # name: device, N, D, L, k, lr, steps, hookpoint of the embedded model or None
    "C1": ("cpu", 2048, 768, 12288, 32, 3e-4, 24, None),
    "C2": ("cpu", 1024, 768, 24576, 32, 3e-4, 24, None),
    "M1": ("cpu", 2048, 512, 8192, 32, 1e-3, 30, "h.3.mlp.act"),
    "tiny": ("cpu", 64, 32, 256, 4, 1e-3, 4, None),
    "S1": ("cuda", 8192, 768, 24576, 32, 2e-4, 60, None),
    "S2": ("cuda", 8192, 4096, 131072, 64, 1e-4, 20, None),
    "S3": ("cuda", 16384, 2048, 65536, 64, 1e-4, 20, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--only", nargs="+", choices=list(PACKAGES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-screen", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "LIBRARY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.no_screen:
        cpu_screen.pays = lambda *_: False
    if args.memory_of:
        print(json.dumps(peak_memory(*args.memory_of)))
        return
    args.only = args.only or [name for name in PACKAGES if args.device == "cuda" or name != "fastsae-graph"]
    versions = {name: installed_version(PACKAGES[name][0]) for name in args.only}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        sys.exit(
            f"expected {', '.join(missing)} beside fastsae, not installed here; "
            "pip install -r benchmarks/peers/requirements.txt, or choose with --only"
        )
    options = ["--threads", str(args.threads), *["--no-screen"] * args.no_screen]
    cases = args.cases or [name for name, case in CASES.items() if case[0] == args.device and name != "tiny"]
    record = {"environment": environment(args.threads, versions), "screen": not args.no_screen, "cases": {}}
    for name in cases:
        record["cases"][name] = compare(name, args.only, options)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


def setting_of(case: str) -> tuple[Setting, str | None]:
    device, N, D, L, k, lr, steps, hookpoint = CASES[case]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Setting(N, D, L, k, lr, steps, 0, device, dtype), hookpoint


def batches_of(s: Setting, hookpoint: str | None) -> tuple[list[Tensor], Tensor]:
    if hookpoint is None:
        return synthetic(s.N, s.D, s.steps, s.seed, s.device, s.dtype)
    return embedded(s.N, s.steps, s.seed, s.device, s.dtype, hookpoint)


def compare(case: str, libraries: list[str], options: list[str]) -> dict[str, Any]:
    """Train all, interleaved; print and return what each took and reached. ``options``: of processes of their own."""
    s, hookpoint = setting_of(case)
    batches, held_out = batches_of(s, hookpoint)
    contestants, seconds = {}, {name: [] for name in libraries}
    memory = {name: GpuMemory() for name in libraries} if s.device == "cuda" else {}
    for name in libraries:
        with memory.get(name, nullcontext()):
            contestants[name] = make(name, s)
    for i, batch in enumerate(batches):
        turn = libraries[i % len(libraries) :] + libraries[: i % len(libraries)]
        for name in turn:
            with memory.get(name, nullcontext()):
                seconds[name].append(timed(contestants[name], batch, s.device))
    results = {}
    for name, contestant in contestants.items():
        results[name] = {
            "ms": [round(1e3 * t, 3) for t in seconds[name]],
            "median_ms": 1e3 * median(seconds[name][3:] or seconds[name]),  # the first ones warm up
            "peak_mib": memory[name].peak / 2**20 if memory else peak_in_a_process(case, name, options),
            "fvu": held_out_fvu(contestant.reconstruct, held_out),
        }
    report(case, s, hookpoint, results)
    return {"setting": {**s._asdict(), "dtype": str(s.dtype)}, "hookpoint": hookpoint, "results": results}


def timed(contestant: Contestant, batch: Tensor, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    contestant.step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held_out_fvu(reconstruct: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Σ ‖x - x̂‖² / Σ ‖x - mean‖² in float64."""
    exact = x.double()
    error = sum((part.double() - reconstruct(part).double()).square().sum() for part in x.split(1024))
    return float(error / (exact - exact.mean(0)).square().sum())


class GpuMemory:
    """Sums up what a library keeps in its ``with`` blocks; ``peak``: and at most holds beyond that inside of one."""

    def __init__(self) -> None:
        self.kept = self.peak = 0

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *_error: object) -> None:
        self.peak = max(self.peak, self.kept + torch.cuda.max_memory_allocated() - self._before)
        self.kept += torch.cuda.memory_allocated() - self._before


def peak_in_a_process(case: str, library: str, options: list[str]) -> float:
    command = [sys.executable, __file__, "--memory-of", case, library, *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def peak_memory(case: str, library: str) -> float:
    """MiB of this process that four steps need beyond what was there before the library's coder was made."""
    s, _ = setting_of(case)
    batches, _ = synthetic(s.N, s.D, 4, s.seed, s.device, s.dtype)
    make(library, s._replace(N=4, D=8, L=64, k=2)).step(batches[0][:4, :8].contiguous())  # imports and first-use costs
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM, see proc(5)
    before = resident("VmRSS")
    contestant = make(library, s)
    for batch in batches:
        contestant.step(batch)
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def report(case: str, s: Setting, hookpoint: str | None, results: dict[str, dict[str, Any]]) -> None:
    ours = results.get("fastsae", {}).get("median_ms")
    where = f"the embedded model's {hookpoint}" if hookpoint else "synthetic activations"
    print(f"\n{case}: N={s.N} D={s.D} L={s.L} k={s.k}, Adam, {s.steps} steps of {where}, {s.device}")
    print(f"{'':22}{'ms/step':>9}{'tokens/s':>11}{'peak MiB':>10}{'FVU':>9}{'fastsae takes':>15}")
    for name, r in results.items():
        share = f"{ours / r['median_ms']:.2f} of it" if ours and name != "fastsae" else ""
        rate = s.N / r["median_ms"] * 1e3
        print(f"{name:22}{r['median_ms']:9.1f}{rate:11,.0f}{r['peak_mib']:10.0f}{r['fvu']:9.4f}{share:>15}", flush=True)


def installed_version(package: str) -> str | None:
    if package == "fastsae":  # also from a checkout on PYTHONPATH
        from fastsae import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(threads: int, versions: dict[str, str | None]) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    cpu = next((line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(), "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu or platform.processor(), "threads": threads, "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {**versions, "torch": torch.__version__, "triton": installed_version("triton")},
    }  # fmt: skip


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
