"""How a coder's step grows: doubles N, then L, and prints time and memory per doubling.

    python benchmarks/growth.py [--device cuda] [--json FILE]

A step is the joint one with Adam behind it. Memory is the peak of a step beyond what was there before it; the
weights and moments, 24·L·D bytes, are there before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from fastsae_kernels import Adam, Coder, Loss, Rows, RowStep, coder_step
from fastsae_kernels.testing import make_inputs

from fastsae.bench.timing import QUICK, clock_for, percentile, time_rounds

START = {"cpu": (512, 384, 4096, 32), "cuda": (4096, 1024, 16384, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    N, D, L, k = START[torch.device(args.device).type]
    clock, rows = clock_for(torch.device(args.device)), []
    print(f"{'N':>7}{'D':>6}{'L':>7}{'k':>4}{'ms':>9}{'x':>6}{'MiB':>8}")
    for axis in ("N", "L"):
        before = None
        for i in range(args.doublings + 1):
            shape = (N << i, D, L, k) if axis == "N" else (N, D, L << i, k)
            call = step(*shape, args.device)
            ms = percentile(time_rounds(clock, {"step": call}, QUICK)["step"], 50)
            peak = clock.peak_mib(call)
            ratio = "" if before is None else f"{ms / before:.2f}"
            print(f"{shape[0]:7}{D:6}{shape[2]:7}{k:4}{ms:9.1f}{ratio:>6}{peak or float('nan'):8.0f}", flush=True)
            rows.append({"N": shape[0], "D": D, "L": shape[2], "k": k, "ms": ms, "peak_mib": peak, "doubled": axis})
            before = ms
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def step(N: int, D: int, L: int, k: int, device: str) -> Callable[[], object]:
    """A training step as a call; tokens differ from call to call."""
    inputs = make_inputs(N * 4, D, L, device=device)
    gpu = device != "cpu"
    batches = list((inputs.x.bfloat16() if gpu else inputs.x).split(N))
    rule = Adam()
    matrices = [Rows(inputs.weight, rule.new_state(inputs.weight), low=inputs.weight.bfloat16() if gpu else None)]
    low = inputs.W_dec.bfloat16() if gpu else None
    matrices.append(Rows(inputs.W_dec, rule.new_state(inputs.W_dec), unit_rows=True, low=low))
    coder = Coder(
        inputs.weight, inputs.bias, inputs.W_dec, inputs.b_dec, low_weight=matrices[0].low, low_W_dec=matrices[1].low
    )
    row_step = RowStep(rule, 1e-4, 0, *matrices)

    def call() -> None:
        x = batches[row_step.step % 4]
        row_step.step += 1
        variance = (x.float() - x.float().mean(0)).square().sum()
        coder_step(x, x, coder, Loss(variance), row_step, k=k, implementation="triton" if gpu else "cpu")

    return call


if __name__ == "__main__":
    main()
