"""Whole training runs, fastsae beside sparsify: coders at every MLP of a GPT-2, both libraries' own Trainer.

    python benchmarks/peers/end_to_end.py --json FILE            # GPT-2 small's shape, 12 coders; on a GPU
    python benchmarks/peers/end_to_end.py --size demo            # the embedded model's shape, 6 coders; on a CPU, too

Model forward, hooks, data and optimizer are in the time; start, compilation and saving are not: the clock runs from the
``--warm``-th batch to the one ``--steps`` later, with the device idle at both ends. Each library has a process of its
own, in turn, ``--rounds`` times. Peak memory is torch's allocator's on a GPU, the process's on a CPU. The model's
weights and the tokens are random: speed does not depend on them. FVU (float64 sums, mean over the coders) is on
held-out tokens, with the weights after as many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from run import environment, held_out_fvu, installed_version
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

SIZES = {  # layers, width, latents, k, sequences of a batch, tokens of a sequence, vocabulary
    "gpt2": (12, 768, 24576, 32, 8, 1024, 50257),
    "demo": (6, 128, 8192, 32, 8, 256, 4096),
    "tiny": (2, 32, 512, 4, 2, 64, 256),
}
LIBRARIES = {"fastsae": "fastsae", "sparsify": "eai-sparsify"}


class Done(BaseException):
    """Ends a Trainer's run from inside the model; nobody but us catches it."""


class Clock:
    """Counts the model's forwards in a run, notes the time at two of them, and ends the run at the second."""

    def __init__(self, model: nn.Module, warm: int, steps: int):
        self.marks, self._calls, self._ends = [], 0, (warm, warm + steps)
        self._embedding = model.get_input_embeddings()

    def end(self, fit: Callable[[], Any]) -> None:
        """Run ``fit`` until it is time. Forwards by which Trainers look at widths come before it, and do not count."""
        handle = self._embedding.register_forward_pre_hook(self)
        try:
            fit()
        except Done:
            return
        finally:
            handle.remove()
        raise SystemExit("expected the clock to end the run, the data ended before")

    def __call__(self, *_: Any) -> None:
        if self._calls in self._ends:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        if self._calls == self._ends[1]:
            raise Done
        self._calls += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="gpt2", choices=list(SIZES))
    parser.add_argument("--optimizer", default="signum", choices=("signum", "adam"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    own = ["--size", args.size, "--optimizer", args.optimizer, "--steps", str(args.steps), "--warm", str(args.warm)]
    for i in range(args.rounds):
        for name in args.only if i % 2 == 0 else reversed(args.only):
            command = [sys.executable, __file__, "--run", name, *own]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, rounds)
    if args.json:
        versions = {name: installed_version(LIBRARIES[name]) for name in args.only}
        setting = {**shape_of(args.size), "optimizer": args.optimizer, "steps": args.steps, "warm": args.warm}
        record = {"environment": environment(torch.get_num_threads(), versions), "setting": setting, "rounds": rounds}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def shape_of(size: str) -> dict[str, int]:
    names = ("layers", "width", "latents", "k", "sequences", "length", "vocabulary")
    return dict(zip(names, SIZES[size], strict=True))


def report(args: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]) -> None:
    layers, width, latents, k, *_ = SIZES[args.size]
    print(f"{layers} coders on mlp.act (D={4 * width} L={latents} k={k}), {args.optimizer}, {args.steps} steps")
    print(f"{'':10}{'tokens/s':>10}{'peak MiB':>10}{'FVU':>9}")
    for name, results in rounds.items():
        middle = {key: median(result[key] for result in results) for key in results[0]}
        print(f"{name:10}{middle['tokens_per_second']:10,.0f}{middle['peak_mib']:10,.0f}{middle['fvu']:9.4f}")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One library's run in this process."""
    layers, width, latents, k, sequences, length, vocabulary = SIZES[args.size]
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=max(1, width // 64), n_positions=length, vocab_size=vocabulary
    )
    model = GPT2Model(config).to(device, dtype).eval()
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, ((args.warm + args.steps + 2) * sequences, length), generator=gen)
    held_out = ids[-2 * sequences :].to(device)
    rows = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    clock = Clock(model, args.warm, args.steps)
    options = {"batch_size": sequences, "hookpoints": ["h.*.mlp.act"], "optimizer": args.optimizer}
    with tempfile.TemporaryDirectory() as folder:
        coders, weights = TRAINERS[args.run](model, rows, options, latents, k, folder, clock)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else getrusage(RUSAGE_SELF).ru_maxrss / 2**10
    with torch.no_grad(), weights():
        reached = [
            held_out_fvu(lambda x, coder=coder: coder(x).sae_out, activations(model, name, held_out))
            for name, coder in coders.items()
        ]
    tokens = args.steps * sequences * length
    return {
        "tokens_per_second": tokens / (clock.marks[1] - clock.marks[0]),
        "peak_mib": peak, "fvu": sum(reached) / len(reached),
    }  # fmt: skip


def train_fastsae(model, rows, options, latents, k, folder, clock):
    from fastsae import SaeConfig, TrainConfig, Trainer

    sae = SaeConfig(num_latents=latents, k=k)
    cfg = TrainConfig(sae, **options, held_out=0, save_dir=folder, save_every=10**9)
    trainer = Trainer(cfg, rows, model)
    clock.end(partial(trainer.fit, progress=False))
    return trainer.coders, trainer.evaluation_weights


def train_sparsify(model, rows, options, latents, k, folder, clock):
    if model.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its CPU path is the eager one
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    sae = SparseCoderConfig(num_latents=latents, k=k)
    cfg = TrainConfig(sae, **options, log_to_wandb=False, save_dir=folder, save_every=10**9)
    with redirect_stdout(sys.stderr):
        trainer = Trainer(cfg, rows, model)
        clock.end(trainer.fit)
    if options["optimizer"] == "signum":
        trainer.optimizers[0].eval()
    return trainer.saes, nullcontext


TRAINERS = {"fastsae": train_fastsae, "sparsify": train_sparsify}


@torch.no_grad()
def activations(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """[N, D] at the module ``name``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _x, out: seen.append(out.flatten(0, 1)))
    model(ids)
    handle.remove()
    return torch.cat(seen)


if __name__ == "__main__":
    main()
