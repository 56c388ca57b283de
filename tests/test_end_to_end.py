"""Training on the model's own losses: values and gradients against float64 autograd, and runs that stop and go on."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from models import make_model, save_model, token_rows
from test_resume import STEPS, files, resumed, stopped
from test_resume import make_trainer as resumable
from torch.nn.functional import cross_entropy, kl_div

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.errors import ArtifactError, ConfigError
from fastsae.model_loss import loss_and_gradient

HOOKS = ("h.0", "h.1.mlp")
ALPHA = 1 / 4


def make_trainer(folder, loss_fn: str = "kl", rows=None, model=None, **options) -> Trainer:
    values = {
        "sae": SaeConfig(num_latents=48, k=4), "batch_size": 4, "hookpoints": HOOKS, "lr": 0.01, "log_every": 1,
        "save_dir": str(folder), "run_name": "run", **options,
    }  # fmt: skip
    cfg = TrainConfig(loss_fn=loss_fn, **values)  # type: ignore[arg-type]
    return Trainer(cfg, token_rows(42, 8) if rows is None else rows, model or make_model("gpt2"))


def reconstruct(w: dict[str, torch.Tensor], x: torch.Tensor, k: int, transcode: bool, mask=None) -> torch.Tensor:
    """The coder's function, from its definition; ``mask``: of the masked latents alone, without b_dec."""
    pre = ((x if transcode else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    pre = pre if mask is None else pre * mask
    top = pre.topk(k)
    out = torch.zeros_like(pre).scatter(-1, top.indices, top.values) @ w["W_dec"]
    return out + w["b_dec"] if mask is None else out


def direct(trainer: Trainer, model, batch: dict[str, torch.Tensor], kept: torch.Tensor, dead: dict, transcode: bool):
    """(loss, {coder: fvu}, gradients by parameter) of one batch by autograd in float64."""
    model, ids = model.double(), batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids))
    weights = {
        name: {key: t.detach().double().requires_grad_() for key, t in coder.state_dict().items()}
        for name, coder in trainer.coders.items()
    }
    clean, fvus, auxk = model(ids, attention_mask=real).logits.detach(), {}, []

    def hook(name, _module, args, output):
        y = output[0] if isinstance(output, tuple) else output
        x = args[0] if transcode else y
        new = reconstruct(weights[name], x, 4, transcode)
        rows, variance = y[kept], (y[kept] - y[kept].mean(0)).square().sum().detach()
        fvus[name] = (rows - new[kept]).square().sum() / variance
        if name in dead:
            residual = (rows - new[kept]).detach()
            mask = torch.zeros(48, dtype=torch.float64).index_fill(0, dead[name], 1.0)
            hat = reconstruct(weights[name], x[kept].detach(), 16, transcode, mask)
            auxk.append(ALPHA * min(len(dead[name]) / 16, 1) * (hat - residual).square().sum() / variance)
        out = torch.where(kept[..., None], new, y)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    handles = [
        model.base_model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in trainer.coders
    ]
    logits = model(ids, attention_mask=real).logits
    for handle in handles:
        handle.remove()
    real = real.bool()
    if trainer.cfg.loss_fn == "ce":
        both = real[:, 1:] & real[:, :-1]
        loss = cross_entropy(logits[:, :-1][both], ids[:, 1:][both])
    else:
        q, p = clean[real].log_softmax(-1), logits[real].log_softmax(-1)
        loss = kl_div(p, q, log_target=True, reduction="sum") / real.sum()
    leaves = {f"{name}/{key}": t for name, of in weights.items() for key, t in of.items()}
    grads = torch.autograd.grad(loss + sum(auxk), list(leaves.values()))
    return loss.item(), {name: fvu.item() for name, fvu in fvus.items()}, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(
    ("loss_fn", "case"),
    [("ce", "plain"), ("kl", "plain"), ("ce", "excluded"), ("kl", "excluded"), ("kl", "auxk"), ("ce", "transcode")],
)
def test_losses_and_gradients_are_float64_autograds(tmp_path, monkeypatch, loss_fn, case):
    model, rows = make_model("gpt2"), token_rows(42, 8)
    batch: dict[str, torch.Tensor] = {"input_ids": rows[:4]["input_ids"]}
    kept = torch.ones(4, 8, dtype=torch.bool)
    options: dict = {"auxk_alpha": ALPHA} if case == "auxk" else {}
    if case == "excluded":
        options["exclude_tokens"] = tuple(int(ids[i]) for i, ids in enumerate(batch["input_ids"]))
        batch["attention_mask"] = torch.ones(4, 8, dtype=torch.int64)
        batch["attention_mask"][2, 5:] = 0
        kept = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], torch.tensor(options["exclude_tokens"]))
        assert 0 < int(kept.sum()) < 29
    if case == "transcode":
        options |= {"sae": SaeConfig(num_latents=48, k=4, transcode=True), "hookpoints": ("h.0.mlp", "h.1.mlp")}
    trainer = make_trainer(tmp_path, loss_fn, rows, model, **options)
    for i, coder in enumerate(trainer.coders.values()):
        generator = torch.Generator().manual_seed(i)
        for parameter in coder.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    trainer.first_batches.initialised |= set(trainer.coders)  # biases as they are
    dead = {}
    if case == "auxk":
        dead = {"h.0": torch.arange(3, 40, 5), "h.1.mlp": torch.arange(0, 48, 2)}
        for name, ids in dead.items():
            monkeypatch.setattr(trainer.metrics[name], "dead_ids", lambda ids=ids: ids)
    loss, fvus, expected = direct(trainer, make_model("gpt2"), batch, kept, dead, case == "transcode")
    assert trainer.end_to_end is not None
    trainer.end_to_end.train(batch, 1.0, 0)
    for name, coder in trainer.coders.items():
        assert trainer.metrics[name].read(10**9)["fvu"] == pytest.approx(fvus[name], rel=1e-4)
        for key, parameter in coder.named_parameters():
            grad = expected[f"{name}/{key}"].float()
            assert parameter.grad is not None
            assert grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, grad, rtol=2e-3, atol=2e-5 * float(grad.abs().max()) + 1e-9)
    assert trainer.end_to_end.read() == pytest.approx(loss, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_written_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    clean = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    ids, real = torch.randint(0, 11, (3, 5), generator=generator), torch.ones(3, 5, dtype=torch.bool)
    real[1, 3:] = False
    both = real[:, 1:] & real[:, :-1]
    ce = cross_entropy(logits[:, :-1][both], ids[:, 1:][both])
    loss, grad = loss_and_gradient(logits.detach(), None, ids, real, int(both.sum()))
    torch.testing.assert_close(loss, ce.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(ce, logits)[0])
    q, p = clean[real].log_softmax(-1), logits[real].log_softmax(-1)
    kl = (q.exp() * (q - p)).sum() / real.sum()
    loss, grad = loss_and_gradient(logits.detach(), clean, ids, real, int(real.sum()))
    torch.testing.assert_close(loss, kl.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(kl, logits)[0])


def test_kl_and_its_gradient_are_zero_for_a_perfect_coder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, hookpoints=("h.1",))
    coder = trainer.coders["h.1"]

    def perfect(x, y=None, **_options):
        out = type(coder).forward(coder, x, y)
        return out._replace(sae_out=out.sae_out + (x - out.sae_out).detach())

    monkeypatch.setattr(coder, "forward", perfect)
    trainer.first_batches.initialised.add("h.1")
    assert trainer.end_to_end is not None
    trainer.end_to_end.train({"input_ids": token_rows(4, 8)[:4]["input_ids"]}, 1.0, 0)
    assert abs(trainer.end_to_end.read()) < 1e-7
    for parameter in coder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-7


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_training_lowers_the_loss_and_leaves_the_model_alone(tmp_path, loss_fn):
    model = make_model("gpt2").train()
    for parameter in model.parameters():
        parameter.data *= 4  # so that predictions depend on what comes before
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    rows = token_rows(2, 8)
    rows = rows.select([0, 1] * 100)
    trainer = make_trainer(tmp_path, loss_fn, rows, model, lr=0.02, save_best=True, save_every=20)
    summary = trainer.fit(progress=False)
    records = [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert {"fvu/h.0", "fvu/h.1.mlp", "dead_pct/h.0"} <= records[-1].keys()
    best = json.loads((summary.folder / "best/best.json").read_text())
    assert best["h.0"]["loss"] == best["h.1.mlp"]["loss"] <= trainer.held_out_metrics()["h.0"]["loss"]
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_restored_after_an_error(tmp_path, monkeypatch):
    model = make_model("gpt2").train()
    trainer = make_trainer(tmp_path, model=model)

    def broken(*_args, **_options):
        raise RuntimeError("broken coder")

    monkeypatch.setattr(trainer.coders["h.1.mlp"], "forward", broken)
    with pytest.raises(RuntimeError, match="broken coder"):
        trainer.fit(progress=False)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_accumulated_batches_are_the_mean_of_both(tmp_path):
    rows = token_rows(42, 8)
    first, second = ({"input_ids": rows[i : i + 4]["input_ids"]} for i in (0, 4))
    both = {"input_ids": rows[0:8]["input_ids"]}

    def after(batches, **options):
        trainer = make_trainer(tmp_path, "ce", rows, lr_warmup_steps=0, **options)
        trainer.first_batches.initialised |= set(trainer.coders)
        trainer.train_step(batches)
        return {f"{n}/{k}": t for n, c in trainer.coders.items() for k, t in c.state_dict().items()}, trainer

    one, whole = after([both])
    two, parts = after([first, second], grad_acc_steps=2)
    assert parts.read_metrics()["loss"] == pytest.approx(whole.read_metrics()["loss"], rel=1e-5)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    options = {"loss_fn": "kl", "log_every": 3, "grad_acc_steps": 1, "exclude_tokens": (3, 5, 7)}
    whole = files(resumable(tmp_path / "whole", **options).fit(progress=False).folder)
    assert STEPS == 10
    run = stopped(resumable(tmp_path / "part", **options), 7)
    assert files(resumed(resumable(tmp_path / "part", **options), run)) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_acc_steps": 2}, "grad_acc_steps"),
        ({"distribute_modules": True}, "replicas"),
        ({"distribute_latents": 2}, "replicas"),
        ({"init_seeds": (0, 1)}, "one coder"),
        ({"sae": SaeConfig(num_latents=48, k=4, multi_topk=True)}, "multi_topk"),
        ({"sae": SaeConfig(num_latents=48, k=4, activation="batchtopk")}, "batchtopk"),
        ({"set": ("h.0:k=2|4",)}, "one coder per hookpoint"),
        ({"model": make_model("gpt2").transformer}, "LM head"),
    ],
)
def test_what_cannot_be_trained_end_to_end_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **options)


def test_the_command_line_trains_end_to_end(tmp_path):
    from fastsae.run import train_run

    token_rows(42, 16).save_to_disk(str(tmp_path / "rows"))
    options = {
        "loss_fn": "kl", "hookpoints": ("*.1.*output",), "num_latents": 64, "k": 4, "ctx_len": 16, "batch_size": 8,
        "save_dir": str(tmp_path), "run_name": "run", "log_every": 1, "dataset": str(tmp_path / "rows"),
    }  # fmt: skip
    gpt2 = {**options, "hookpoints": ("h.1",), "model": str(save_model("gpt2", tmp_path / "gpt2"))}
    train_run(gpt2)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] > 0
    bert = save_model("bert", tmp_path / "bert")
    with pytest.raises(ArtifactError, match="causal"):
        train_run({**options, "run_name": "other", "model": str(bert)})
