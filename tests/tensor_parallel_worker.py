"""What one rank of ``tests/test_tensor_parallel.py`` does; the test compares what it writes with a single process's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from models import token_rows

from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, load_model
from fastsae.activations import ModelPass
from fastsae.distributed.joining import joined
from fastsae.errors import FastsaeError
from fastsae.shards import probe_whole

WHOLE = ("embed_tokens", "layers.0", "layers.0.mlp", "layers.1.self_attn", "layers.1", "norm")
SLICED = ("layers.0.mlp.act_fn", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj")  # the last one's input

RUNS: dict[str, dict[str, Any]] = {
    "owners": {"hookpoints": ("layers.*", "layers.0.mlp.act_fn")},
    "grouped": {"hookpoints": ("layers.*",), "distribute_modules": True, "grad_acc_steps": 2, "token_buffer": 20},
    "split": {"hookpoints": ("layers.1", "layers.0.mlp.act_fn"), "latents": True, "save_best": True},
}

TRANSCODERS = {
    "hookpoints": ("layers.*.mlp.down_proj",), "sae": {"transcode": True}, "exclude_tokens": tuple(range(1500)),
    "max_grad_norm": 1e9,
}  # fmt: skip
"""Their b_dec starts at the mean, where Adam makes steps of rounding: gradients are compared instead."""


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of this process's coders, by name and parameter, in the first step."""
    found: dict[str, torch.Tensor] = {}
    trainer._strategy.reduce = lambda coders, _metrics: found.update(
        (f"{name} {key}", p.grad.clone())
        for name, coder in coders.items()
        for key, p in coder.named_parameters()
        if p.grad is not None
    )
    trainer.train_step(next(iter(trainer._steps()))[0])
    return found


def make_trainer(model: Any, folder: Path, name: str, ranks: int = 1, rows: Any = None, **changes: Any) -> Trainer:
    sae = SaeConfig(num_latents=67, k=5, **changes.pop("sae", {}))
    if changes.pop("latents", False):
        changes["distribute_latents"] = ranks
    elif ranks == 1:
        changes.pop("distribute_modules", None)
    fields = {"batch_size": 6, "held_out": 2, "log_every": 1, "save_every": 2, "auxk_alpha": 1 / 32, **changes}
    cfg = TrainConfig(sae, save_dir=str(folder), run_name=name, dead_feature_threshold=60, **fields)
    return Trainer(cfg, token_rows(51, 5) if rows is None else rows, model)


def activations(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(x, y) at every hookpoint, as coders get them."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    source = ModelPass(model, probe_whole(model, WHOLE[1:] + SLICED), transcode=True)
    source.run({"input_ids": token_rows(3, 7)[:]["input_ids"]}, lambda n, x, y: seen.update({n: (x, y)}), at="here")
    plain = ModelPass(model, probe_whole(model, WHOLE + SLICED))
    plain.run({"input_ids": token_rows(3, 7)[:]["input_ids"]}, lambda n, x, y: seen.setdefault(n, (y, y)), at="here")
    return seen


class Stop(Exception):
    """The end of a run that is to be gone on with."""


def stop(trainer: Trainer) -> None:
    log = trainer._log

    def logged(*arguments: Any) -> None:
        log(*arguments)
        if trainer.step == 3:
            raise Stop

    trainer._log = logged


def main(folder: Path, llama: str, gpt2: str) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as world:
        model = load_model(llama, RunConfig(tp_plan="auto"))
        sizes = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        torch.save({"activations": activations(model), "size": sizes}, folder / f"seen-{world.rank}.pt")
        for name, changes in RUNS.items():
            make_trainer(model, folder, name, world.size, **changes).fit(progress=False)
        transcoders = make_trainer(model, folder, "transcoders", world.size, **TRANSCODERS)
        torch.save(first_gradients(transcoders), folder / f"gradients-{world.rank}.pt")
        stopped = make_trainer(model, folder, "stopped", world.size, **RUNS["owners"])
        stop(stopped)
        try:
            stopped.fit(progress=False)
        except Stop:
            world.wait()
        if world.first:
            shutil.copytree(folder / "stopped", folder / "copied")
        world.wait()
        again = make_trainer(model, folder, "stopped", world.size, **RUNS["owners"])
        again.resume(folder / "stopped")
        again.fit(progress=False)
        refusals = {name: said(work) for name, work in wrong(folder, model, gpt2, world).items()}
        torch.save(refusals, folder / f"refusals-{world.rank}.pt")


def lose(folder: Path, llama: str, at: str, hookpoint: str) -> None:
    """Rank 1 leaves when its model comes to ``at``; what the others say is written."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        model = load_model(llama, RunConfig(tp_plan="auto"))
        trainer = make_trainer(model, folder, f"lost-{at}", world.size, hookpoints=(hookpoint,))
        if world.rank == 1:
            model.get_submodule(at).register_forward_pre_hook(leave)
        batch = next(iter(trainer._steps()))[0]
        (folder / f"{at}.txt").write_text(said(lambda: trainer.train_step(batch)))


def leave(*_: Any) -> None:
    os._exit(3)


def wrong(folder: Path, model: Any, gpt2: str, world: Any) -> dict[str, Any]:
    rows = token_rows(51, 5, seed=world.rank)
    other = make_trainer(model, folder, "other", world.size, rows=rows, hookpoints=("layers.1",))
    return {
        "no plan": lambda: load_model(gpt2, RunConfig(tp_plan="auto")),
        "other rows": lambda: other.train_step(next(iter(other._steps()))[0]),
        "half": lambda: make_trainer(model, folder, "half", hookpoints=("layers.1",), distribute_latents=3),
        "kl": lambda: make_trainer(model, folder, "kl", hookpoints=("layers.1",), loss_fn="kl"),
        "partial": lambda: ModelPass(spoiled(model, world.rank), probe_whole(model, ("layers.0",))),
    }


def spoiled(model: Any, rank: int) -> Any:
    """A layer that gives other numbers on each rank, as sums that were not made would be."""
    model.layers[0].register_forward_hook(lambda _m, _i, y: y + rank)
    return model


def said(work: Any) -> str:
    try:
        work()
    except FastsaeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
