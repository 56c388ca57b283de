"""What can go wrong while a run trains: memory that runs out, a model that fails, activations that stop coming."""

from __future__ import annotations

import pytest
import torch
from models import make_model, token_rows

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, ops
from fastsae.errors import ArtifactError, HookpointError, OutOfMemoryError

BATCH_TOPK = {"sae": SaeConfig(activation="batchtopk", num_latents=64, k=4, matryoshka_widths=(16,))}
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def make_trainer(tmp_path, model=None, **options) -> Trainer:
    values = {
        "sae": SaeConfig(num_latents=64, k=4), "batch_size": 4, "hookpoints": ("h.0", "h.1.mlp"), "lr": 0.01,
        "save_dir": str(tmp_path), "run_name": "run", "save_every": 2, **options,
    }  # fmt: skip
    return Trainer(TrainConfig(**values), token_rows(42, 8), make_model("gpt2") if model is None else model)


def small_memory(monkeypatch, tokens: int, error: Exception) -> list[int]:
    """Let coders' steps on more than ``tokens`` tokens fail, before they change anything; the sizes that fit."""
    fitted, coder_step = [], ops.coder_step

    def step(x, *args, **options):
        if len(x) > tokens:
            raise error
        fitted.append(len(x))
        return coder_step(x, *args, **options)

    monkeypatch.setattr(ops, "coder_step", step)
    return fitted


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_SAYS)])
@pytest.mark.parametrize("options", [{}, {"optimizer": "signum", "lr": 1e-4}, {"grad_acc_steps": 2}, BATCH_TOPK])
def test_memory_that_runs_out_halves_the_micro_batch_and_changes_no_number(
    tmp_path, monkeypatch, caplog, error, options
):
    plain = make_trainer(tmp_path / "a", **options)
    plain.fit(progress=False)
    fitted = small_memory(monkeypatch, 10, error)  # of 32
    trainer = make_trainer(tmp_path / "b", **options)
    trainer.fit(progress=False)
    assert trainer.micro_batches.parts == 4
    assert set(fitted) == {8}
    assert [r.getMessage().partition(";")[0] for r in caplog.records if "out of memory" in r.getMessage()] == [
        "h.0: out of memory on 32 tokens", "h.0: out of memory on 16 tokens",
    ]  # fmt: skip
    for name, coder in plain.coders.items():
        for key, tensor in coder.state_dict().items():
            torch.testing.assert_close(trainer.coders[name].state_dict()[key], tensor, atol=2e-4, rtol=2e-3)


def test_every_row_takes_one_step_where_memory_runs_out_between_coders(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    coder_step, calls = ops.coder_step, []

    def step(x, *args, **options):
        calls.append(len(x))
        if calls == [32, 32]:  # the second coder's; the first has been updated in place
            raise torch.OutOfMemoryError
        return coder_step(x, *args, **options)

    monkeypatch.setattr(ops, "coder_step", step)
    for (batches, _), _ in zip(trainer._steps(), range(2), strict=False):
        trainer.train_step(batches)
    assert calls == [32, 32, 16, 16, *[16, 16] * 2]
    counts = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert (counts, len(trainer.optimizer.state)) == ({2.0}, 8)


def test_memory_that_runs_out_within_an_update_ends_the_run_and_saves_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    coder_step = ops.coder_step

    def step(x, target, coder, loss, sink, **options):
        if trainer.step == 3:
            sink.rows(0, 8, torch.ones(8, 32), torch.ones(8, 32))
            raise torch.OutOfMemoryError
        return coder_step(x, target, coder, loss, sink, **options)

    monkeypatch.setattr(ops, "coder_step", step)
    with pytest.raises(OutOfMemoryError, match="in the middle of a coder's update.*higher --micro-acc-steps"):
        trainer.fit(progress=False)
    assert [path.name for path in (tmp_path / "run/state").glob("step-*")] == ["step-2"]
    assert FastSae.load_from_disk(tmp_path / "run/h.0").notes["step"] == 2


def test_no_memory_at_all(tmp_path, monkeypatch):
    small_memory(monkeypatch, 0, torch.OutOfMemoryError())
    with pytest.raises(OutOfMemoryError, match="h.0: out of memory with one token at a time; lower --expansion"):
        make_trainer(tmp_path).fit(progress=False)


def failing(trainer: Trainer, at_step: int, change) -> None:
    """Let ``change(output)`` be what the layer h.1 gives from step ``at_step`` (from 1) on."""
    trainer.model.transformer.h[1].mlp.register_forward_hook(
        lambda _m, _a, out: change(out) if trainer.step + 1 >= at_step else out
    )


def fail(error: Exception):
    def change(_output):
        raise error

    return change


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        (fail(IndexError("index 9 is out of range")), ArtifactError,
         "model, step 4: expected its forward to run on 4 x 8 token ids, got IndexError: index 9 is out of range"),
        (fail(torch.OutOfMemoryError("CUDA out of memory.")), OutOfMemoryError,
         "step 4: out of memory in the model's forward on 4 x 8 tokens; lower --batch-size"),
        (lambda out: (None, None), HookpointError, "h.1.mlp, step 4: expected a float tensor .*got none"),
        (lambda out: out.long(), HookpointError, "h.1.mlp, step 4: expected a float tensor .*got none"),
        (lambda out: out[..., :16], HookpointError,
         r"h.1.mlp, step 4: expected activations of width 32, got \[4, 8, 16\]"),
    ],
    ids=["fails", "memory", "nothing", "integers", "width"],
)  # fmt: skip
def test_a_model_that_stops_working_is_named_with_the_step_and_overwrites_nothing(tmp_path, change, expected, message):
    trainer = make_trainer(tmp_path, hookpoints=("h.1.mlp",))
    failing(trainer, 4, change)
    with pytest.raises(expected, match=message):
        trainer.fit(progress=False)
    run = tmp_path / "run"
    assert FastSae.load_from_disk(run / "h.1.mlp").notes["step"] == 2
    again = make_trainer(tmp_path, hookpoints=("h.1.mlp",))
    again.resume(run)
    assert again.step == 2
    assert again.fit(progress=False).coders[0].tokens == 40 * 8
