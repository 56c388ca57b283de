"""FVU and dead latents after equal tokens, fastsae beside sparsify: three seeds, both optimizers.

    python benchmarks/peers/quality.py [--json FILE]

Both train on the same shuffled tokens of the embedded model's activations, with the same width, k and learning
rate (each optimizer's default rule), from the same seeds. Judged on 4096 held-out tokens: FVU in float64, and
latents that fire on none of the last 16384 training tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from contestants import Setting, make
from data import embedded
from run import environment, held_out_fvu, installed_version
from torch import Tensor

from fastsae.optim import default_lr

N, D, L, K, STEPS = 2048, 512, 8192, 32, 100
HOOKPOINT = "h.3.mlp.act"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{HOOKPOINT} of the embedded model, N={N} D={D} L={L} k={K}, {args.steps} steps, three seeds")
    for optimizer in ("adam", "signum"):
        reached: dict[str, list[tuple[float, float]]] = {"fastsae": [], "sparsify": []}
        for seed in range(3):
            s = Setting(
                N, D, L, K, default_lr(optimizer, L), args.steps, seed, "cpu", torch.float32, optimizer
            )  # fmt: skip
            batches, held_out = embedded(N, args.steps, seed, "cpu", torch.float32, HOOKPOINT)
            for name in reached:
                contestant = make(name, s)
                for batch in batches:
                    contestant.step(batch)
                result = held_out_fvu(contestant.reconstruct, held_out), dead_share(contestant, torch.cat(batches[-8:]))
                reached[name].append(result)
                rows.append(
                    {"library": name, "optimizer": optimizer, "seed": seed, "fvu": result[0], "dead": result[1]}
                )
        for name, results in reached.items():
            fvus, dead = zip(*results, strict=True)
            print(
                f"{optimizer:8}{name:10} FVU {mean(fvus):.4f} ({min(fvus):.4f} ... {max(fvus):.4f})"
                f"   dead {100 * mean(dead):5.1f} %", flush=True,
            )  # fmt: skip
    if args.json:
        versions = {"fastsae": installed_version("fastsae"), "sparsify": installed_version("eai-sparsify")}
        record = {"environment": environment(args.threads, versions), "results": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def dead_share(contestant, tokens: Tensor) -> float:
    """Share of latents without an activation above 0 on ``tokens``."""
    fired = torch.zeros(L, dtype=torch.bool)
    for part in tokens.split(2048):
        acts, indices, *_ = contestant.coder.encode(part)
        fired[indices[acts > 0]] = True
    return 1 - fired.float().mean().item()


if __name__ == "__main__":
    main()
