"""Where the time of ``fastsae train`` goes: ``python benchmarks/profile_training.py [--tokens 100000]``.

Trains on the embedded model and text with the defaults of ``fastsae train``, with a stopwatch around each part of
the loop. "coder step" includes the optimizer's work on the matrices, which happens inside it; "data" is the time
the loop waits for batches and prepares them; "rest" is what remains of the loop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fastsae import (
    RunConfig,
    SaeConfig,
    TrainConfig,
    Trainer,
    activations,
    demo,
    load_model,
    load_tokenizer,
    load_tokens,
    micro_batches,
)
from fastsae import train_step as step_module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = RunConfig(ctx_len=256, max_tokens=args.tokens)
    model = load_model("demo", run)
    tokens = load_tokens("stdlib", run, load_tokenizer("demo", run), model.config)
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(SaeConfig(), batch_size=demo.TRAINING["batch_size"], save_dir=folder, save_every=10**9)
        trainer = Trainer(cfg, tokens, model)
        watch(micro_batches, "joint_step", "coder step", seconds)
        watch(activations, "run_hooked", "model and coders", seconds)
        watch(step_module, "apply_gradients", "optimizer", seconds)
        watch(activations, "prepare", "data", seconds)
        batches = trainer._steps()
        total = -time.perf_counter()
        while True:
            waiting = time.perf_counter()
            group = next(batches, None)
            seconds["data"] += time.perf_counter() - waiting
            if group is None:
                break
            trainer.train_step(group[0])
            if trainer.step % cfg.log_every == 0:
                trainer.read_metrics()
        total += time.perf_counter()
    seconds["model forward"] = seconds.pop("model and coders") - seconds["coder step"]
    seconds["rest"] = total - sum(seconds.values())
    print(
        f"{trainer.tokens} tokens, {len(trainer.coders)} coders, {total:.1f} s, {trainer.tokens / total:,.0f} tokens/s"
    )
    for part in ("model forward", "coder step", "optimizer", "data", "rest"):
        print(f"{part:15}{seconds[part]:8.2f} s{100 * seconds[part] / total:7.1f} %")


def watch(owner: Any, name: str, part: str, seconds: dict[str, float]) -> None:
    """Add the time that calls of ``owner.name`` take to ``seconds[part]``."""
    call: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds[part] += time.perf_counter() - start

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
