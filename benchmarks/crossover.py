"""Where dense products overtake gathered rows in the backward pass: ``python benchmarks/crossover.py [--device cuda]``.

Prints the time of the backward both ways for several numbers of latents per active latent: what
``fastsae_kernels.dense_step.CROSSOVER`` states for CPUs was read from it.
"""

from __future__ import annotations

import argparse
import os

import torch
from fastsae_kernels import Coder, GradSink, Loss, coder_step
from fastsae_kernels.testing import make_inputs

from fastsae.bench.timing import QUICK, clock_for, percentile, time_rounds

SHAPES = [(1024, 768, L, k) for k in (32, 128) for L in (4 * k, 8 * k, 16 * k, 32 * k, 64 * k, 128 * k)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = args.device != "cpu"
    print(f"{'N':>6}{'D':>6}{'L':>7}{'k':>5}{'L/k':>6}{'sparse ms':>11}{'dense ms':>10}")
    for N, D, L, k in SHAPES:
        inputs = make_inputs(N, D, L, dtype=torch.float32, device=args.device)
        x = inputs.x.bfloat16() if gpu else inputs.x
        coder = Coder(inputs.weight, inputs.bias, inputs.W_dec, inputs.b_dec)
        sink = GradSink(torch.zeros_like(inputs.weight), torch.zeros_like(inputs.W_dec))

        def step(way: str, x=x, coder=coder, sink=sink, k=k) -> None:
            os.environ["FASTSAE_BACKWARD"] = way
            coder_step(
                x,
                x,
                coder,
                Loss(x.float().var() * x.numel()),
                sink,
                k=k,
                implementation="triton" if x.is_cuda else "cpu",
            )

        calls = {way: (lambda way=way: step(way)) for way in ("sparse", "dense")}
        times = time_rounds(clock_for(torch.device(args.device)), calls, QUICK)
        sparse, dense = (percentile(times[way], 50) for way in ("sparse", "dense"))
        print(f"{N:6}{D:6}{L:7}{k:5}{L // k:6}{sparse:11.2f}{dense:10.2f}", flush=True)


if __name__ == "__main__":
    main()
