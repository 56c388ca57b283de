"""How a run scales over processes, measured on CPU ranks; and what it sends over links, modelled for GPUs.

    python benchmarks/scaling.py --json FILE                      # 1 and 2 ranks, gloo, one thread each
    python benchmarks/scaling.py --json FILE --write README.md    # and README's tables of it
    python benchmarks/scaling.py --table FILE --write README.md   # the tables of an older record

Measured: coders at every MLP of the embedded model, the same batches in all (a rank has its part), Adam, steps of the
ordinary Trainer timed from barrier to barrier after a warm-up, the three modes in turn in every round, and so are the
numbers of ranks. Modelled: bytes that leave a rank in a step by ``fastsae plan``'s formulas
(``planning/modes.py``), and their time at the stated rates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent / "peers"))

MODES: dict[str, dict[str, Any]] = {
    "replicas": {},
    "--distribute-modules": {"distribute_modules": True},
    "--distribute-latents": {"distribute_latents": 0},  # as many as there are ranks
}
LENGTH, WARM = 256, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=6, help="timed ones of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=16, help="of a step, over all ranks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="make README's tables of what --json wrote")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put them there instead of printing them")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.write and not (args.json or args.table):
        parser.error("--write: expected --json FILE or --table FILE with it, whose numbers README names, got neither")
    if not args.table:
        measure(args)
    if args.table or args.write:
        from scaling_tables import tables

        record = args.table or args.json
        tables(json.loads(record.read_text()), record.name, args.write)


def measure(args: argparse.Namespace) -> None:
    from run import environment, installed_version

    seconds: dict[str, dict[str, list[float]]] = {mode: {str(ranks): [] for ranks in args.ranks} for mode in MODES}
    sent: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    tokens = args.sequences * LENGTH
    for _ in range(args.rounds):
        for ranks in args.ranks:
            for mode, found in launch(ranks, args).items():
                seconds[mode][str(ranks)] += found["seconds"]
                sent[mode][str(ranks)] = found["sent"]
    record = {
        "environment": environment(1, {"fastsae": installed_version("fastsae")}),
        "setting": {"model": "demo", "hookpoints": "h.*.mlp.act", "latents": args.latents, "tokens": tokens},
        "seconds": seconds, "sent": sent,
    }  # fmt: skip
    print(f"{'':22}{'ranks':>6}{'ms/step':>9}{'tokens/s':>10}{'speed-up':>10}{'MiB sent':>10}")
    for mode, by_ranks in seconds.items():
        for ranks, times in by_ranks.items():
            one, step = median(by_ranks[str(args.ranks[0])]), median(times)
            print(
                f"{mode:22}{ranks:>6}{1e3 * step:9.0f}{tokens / step:10,.0f}{one / step:10.2f}"
                f"{sent[mode][ranks] / 2**20:10.1f}"
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def launch(ranks: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By mode, the seconds of each timed step and the bytes that rank 0 gave to operations in one."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        own = [f"--{name}={getattr(args, name)}" for name in ("steps", "latents", "sequences")]
        single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(
            [*command, __file__, "--worker", str(out), *own],
            env={**os.environ, **single}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{ranks} ranks: {done.stderr[-2000:]}")
        return json.loads(out.read_text())


def work(args: argparse.Namespace) -> None:
    """What one rank does."""
    from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, joined, load_model, load_tokenizer, load_tokens

    torch.set_num_threads(1)
    with joined("cpu") as world:
        run = RunConfig(ctx_len=LENGTH, max_tokens=args.sequences * LENGTH * (WARM + args.steps + 1), device="cpu")
        model = load_model("demo", run)
        rows = load_tokens("stdlib", run, load_tokenizer("demo", run), model.config)
        trainers = {}
        for mode, options in MODES.items():
            options = {**options, "distribute_latents": world.size} if "distribute_latents" in options else options
            cfg = TrainConfig(
                SaeConfig(num_latents=args.latents, k=32), batch_size=args.sequences // world.size,
                hookpoints=("h.*.mlp.act",), held_out=0, **options,
            )  # fmt: skip
            trainers[mode] = Trainer(cfg, rows, model, world=world)
        batches = {mode: trainer._steps() for mode, trainer in trainers.items()}
        found: dict[str, dict[str, Any]] = {mode: {"seconds": [], "sent": 0} for mode in MODES}
        for step in range(WARM + args.steps):
            for mode, trainer in trainers.items():
                batch, before = next(batches[mode])[0], world.sent
                world.wait()
                start = time.perf_counter()
                trainer.train_step(batch)
                found[mode]["sent"] = world.sent - before
                world.wait()
                if step >= WARM:
                    found[mode]["seconds"].append(time.perf_counter() - start)
        for steps_left in batches.values():
            steps_left.close()  # type: ignore[attr-defined]
        if world.first:
            args.worker.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
