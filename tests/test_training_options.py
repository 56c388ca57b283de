"""What a run's options do, by value: clipping, a falling k, coders by pattern, finetuning, checkpoints kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import make_model, token_rows

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, ops
from fastsae.errors import CheckpointError, ConfigError, HookpointError
from fastsae.optim import active_latents, apply_gradients, make_optimizer


def make_trainer(tmp_path, rows=None, **options) -> Trainer:
    values = {
        "sae": SaeConfig(num_latents=64, k=4), "batch_size": 4, "hookpoints": ("h.0", "h.1.mlp"), "lr": 0.01,
        "save_dir": str(tmp_path), "run_name": "run", **options,
    }  # fmt: skip
    return Trainer(TrainConfig(**values), token_rows(42, 8) if rows is None else rows, make_model("gpt2"))


def train(trainer: Trainer, steps: int) -> Trainer:
    for (batches, _), _ in zip(trainer._steps(), range(steps), strict=False):
        trainer.train_step(batches)
    return trainer


def assert_same_weights(coder: FastSae, other: FastSae) -> None:
    for name, tensor in coder.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# ---- gradients ----


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
def test_clipped_gradients_are_those_of_torch_on_the_sphere(optimizer):
    torch.manual_seed(0)
    coder = FastSae(5, SaeConfig(num_latents=8, k=2))
    twin = FastSae(5, SaeConfig(num_latents=8, k=2))
    twin.load_state_dict(coder.state_dict())
    ours = make_optimizer(TrainConfig(lr=0.1, optimizer=optimizer), [coder])
    theirs = make_optimizer(TrainConfig(lr=0.1, optimizer=optimizer), [twin])
    for scale in (1.0, 100.0, 0.01):  # the last one is below the limit and stays
        grads = [torch.randn_like(p) * scale for p in coder.parameters()]
        for p, q, grad in zip(coder.parameters(), twin.parameters(), grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        apply_gradients(ours, [coder], max_grad_norm=0.5)
        twin.remove_gradient_parallel_to_decoder_directions()
        norm = torch.stack([q.grad.square().sum() for q in twin.parameters() if q.grad is not None]).sum().sqrt()
        for q in twin.parameters():
            assert q.grad is not None
            q.grad *= min(1.0, 0.5 / float(norm))
        apply_gradients(theirs, [twin])
    for p, q in zip(coder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3 if optimizer == "adam8bit" else 1e-5, rtol=1e-4)


def test_a_limit_that_is_never_met_changes_nothing_but_the_way(tmp_path):
    plain, limited = (train(make_trainer(tmp_path, max_grad_norm=limit), 3) for limit in (None, 1e9))
    assert plain._in_place()
    assert not limited._in_place()
    for name, coder in plain.coders.items():
        for key, tensor in coder.state_dict().items():
            torch.testing.assert_close(limited.coders[name].state_dict()[key], tensor, atol=1e-5, rtol=1e-4)


def test_signum_takes_no_limit():
    with pytest.raises(ConfigError, match="max_grad_norm: expected another optimizer with it, got signum"):
        TrainConfig(max_grad_norm=1.0, optimizer="signum")


# ---- the order of tokens ----


def test_a_token_buffer_trains_every_token_once_in_batches_of_many_sequences(tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {"h.0": [], "h.1.mlp": []}
    options = {"held_out": 0, "sae": SaeConfig(num_latents=64, k=4, transcode=True)}
    plain = make_trainer(tmp_path / "plain", **options)
    trainer = make_trainer(tmp_path / "mixed", token_buffer=100, **options)

    def keep(kept):
        def train(coder, x, y, *_args, **_options):
            name = next(name for name, other in trainer.coders.items() if other is coder)
            kept[name].append(torch.cat([x, y], 1))

        return train

    monkeypatch.setattr(trainer.micro_batches, "train", keep(seen))
    train(trainer, trainer.total_steps)
    came: dict[str, list[torch.Tensor]] = {"h.0": [], "h.1.mlp": []}
    for (batch,), _ in plain._steps():
        plain._run(batch, lambda name, x, y: came[name].append(torch.cat([x, y], 1)), at="test")
    for name, batches in seen.items():
        known = torch.cat(came[name])
        trained = torch.cat(batches)
        assert len(known) == 42 * 8
        assert len(trained) == 42 * 8 - 100
        places = torch.cdist(trained.double(), known.double()).argmin(1)
        torch.testing.assert_close(trained, known[places])  # x beside its own y
        assert len(places.unique()) == len(places)
        assert [len(batch) for batch in batches[-3:]] == [32, 32, 16]
        assert len((places[-48:-16] // 8).unique()) > 8  # a batch of four sequences holds tokens of more
    first, second = seen.values()
    assert [len(batch) for batch in first] == [len(batch) for batch in second]


@pytest.mark.parametrize("strange", [{"loss_fn": "kl"}, {"token_buffer": -1}])
def test_a_token_buffer_that_cannot_be(strange):
    with pytest.raises(ConfigError, match="token_buffer: expected 0"):
        TrainConfig(**{"token_buffer": 64, **strange})


# ---- a falling k ----


def test_k_falls_as_in_sparsify(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, k_decay_steps=4, hookpoints=("h.0",))
    seen, coder_step = [], ops.coder_step
    monkeypatch.setattr(ops, "coder_step", lambda *a, **o: seen.append(o["k"]) or coder_step(*a, **o))
    train(trainer, 6)
    assert seen == [64, 49, 34, 19, 4, 4]
    peer = pytest.importorskip("sparsify.trainer", reason="needs eai-sparsify")
    for step in range(6):
        like = SimpleNamespace(
            global_step=step, cfg=SimpleNamespace(k_decay_steps=4), initial_k=min(64, 10 * 32), final_k=4
        )
        assert peer.Trainer.get_current_k(like) == seen[step]


def test_k_never_falls_from_below():
    cfg, coder = TrainConfig(k_decay_steps=10), FastSae(2, SaeConfig(num_latents=64, k=32))
    assert [active_latents(cfg, coder, step) for step in (0, 5, 10)] == [32, 32, 32]
    with pytest.raises(ConfigError, match="k_decay_steps: expected topk, got groupmax"):
        TrainConfig(SaeConfig(activation="groupmax"), k_decay_steps=10)


def test_multi_topk_and_a_falling_k(tmp_path):
    sae = SaeConfig(num_latents=64, k=4, multi_topk=True)
    trainer = train(make_trainer(tmp_path, sae=sae, k_decay_steps=3, hookpoints=("h.0",)), 5)
    assert trainer.read_metrics()["multi_topk_fvu/h.0"] > 0


# ---- coders by pattern ----


def test_coders_by_pattern_are_those_of_runs_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path / "a", set=("h.0:k=2|8", "h.1*:num_latents=128"))
    assert list(trainer.coders) == ["h.0/k2", "h.0/k8", "h.1.mlp"]
    folder = trainer.fit(progress=False).folder
    alone = make_trainer(tmp_path / "b", hookpoints=("h.0",), sae=SaeConfig(num_latents=64, k=8))
    alone.fit(progress=False)
    assert_same_weights(trainer.coders["h.0/k8"], alone.coders["h.0"])
    saved = FastSae.load_many(folder, local=True)
    assert [(name, c.cfg.k, c.num_latents) for name, c in saved.items()] == [
        ("h.0/k2", 2, 64), ("h.0/k8", 8, 64), ("h.1.mlp", 4, 128),
    ]  # fmt: skip
    assert {c.notes["hookpoint"] for c in saved.values()} == {"h.0", "h.1.mlp"}


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(HookpointError, match="set: no hookpoint of this run matches 'h.7'"):
        make_trainer(tmp_path, set=("h.7:k=2",))


# ---- finetuning ----


def test_finetuning_goes_on_from_saved_coders(tmp_path):
    folder = make_trainer(tmp_path / "a").fit(progress=False).folder
    trainer = make_trainer(tmp_path / "b", finetune=str(folder), lr=1e-12)
    for name, coder in trainer.coders.items():
        assert_same_weights(coder, FastSae.load_from_disk(folder / name))
    before = trainer.coders["h.0"].b_dec.detach().clone()
    train(trainer, 1)
    torch.testing.assert_close(trainer.coders["h.0"].b_dec.detach(), before)  # is not centred anew


def test_decoders_of_other_norms_come_to_norm_1_said_aloud(tmp_path, caplog):
    coder = FastSae(32, SaeConfig(num_latents=64, k=4))
    assert coder.W_dec is not None
    coder.W_dec.data *= torch.linspace(0.85, 1.0, 64)[:, None]  # as sparsify saves them
    coder.save_to_disk(tmp_path / "saved/h.0")
    trainer = make_trainer(tmp_path, finetune=str(tmp_path / "saved"), hookpoints=("h.0",))
    torch.testing.assert_close(trainer.coders["h.0"].W_dec.norm(dim=1), torch.ones(64))
    assert "decoder rows of norm 0.85 to 1 are brought to norm 1" in caplog.text


def test_finetuning_on_other_activations_warns_with_numbers(tmp_path, caplog):
    folder = make_trainer(tmp_path / "a", hookpoints=("h.0",)).fit(progress=False).folder
    notes = FastSae.load_from_disk(folder / "h.0").notes
    model = make_model("gpt2")
    trainer = make_trainer(tmp_path / "b", finetune=str(folder), hookpoints=("h.0",))
    trainer.model.transformer.h[0].register_forward_hook(lambda _m, _a, out: 3 * out)
    with torch.no_grad():
        y = model.transformer(token_rows(42, 8)[:4]["input_ids"], output_hidden_states=True).hidden_states[1]
    assert notes["activation_norm"] == pytest.approx(y.norm(dim=-1).mean().item(), rel=1e-5)
    assert notes["activation_mean"] == pytest.approx(y.flatten(0, 1).mean(0).norm().item(), rel=1e-5)
    train(trainer, 1)
    assert f"expected activations of mean norm {notes['activation_norm']:.4g}, as in training" in caplog.text
    assert "(3 times)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sae": SaeConfig(num_latents=128, k=4)}, "expected a saved coder with num_latents = 128, got 64"),
        ({"sae": SaeConfig(num_latents=64, k=4, skip_connection=True)}, "with skip_connection = True, got False"),
        ({"hookpoints": ("h.2",)}, "finetune: expected a saved coder for h.2, found h.0, h.1.mlp"),
        ({"finetune": "./nowhere"}, "expected a run's folder or a hub id, got './nowhere'"),
    ],
)
def test_coders_that_cannot_be_gone_on_from(tmp_path, options, message):
    folder = make_trainer(tmp_path / "a").fit(progress=False).folder
    with pytest.raises(CheckpointError, match=message):
        make_trainer(tmp_path / "b", **{"finetune": str(folder), **options})


# ---- checkpoints kept ----


def test_the_last_and_the_best_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, save_every=3, keep_last=2, save_best=True, hookpoints=("h.0",), held_out=2)
    measured, held_out_metrics = {}, trainer.held_out_metrics

    def measure():
        found = held_out_metrics()
        measured.setdefault(trainer.step, found["h.0"]["fvu"])
        if trainer.step == 6:  # from here on it only gets worse
            trainer.optimizer.param_groups[0]["lr"] = trainer.optimizer.param_groups[1]["lr"] = 0.0
            trainer.schedule.base_lrs = [1.0, 1.0]
        return found

    trainer.held_out_metrics = measure  # type: ignore[method-assign]
    folder = trainer.fit(progress=False).folder
    assert sorted(measured) == [3, 6, 9, 10]
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["10", "9"]
    assert FastSae.load_from_disk(folder / "steps/9/h.0").notes["step"] == 9
    best = json.loads((folder / "best/best.json").read_text())["h.0"]
    step = min(measured, key=lambda s: measured[s])
    assert step < 10
    assert best == {"fvu": measured[step], "step": step}
    assert FastSae.load_from_disk(folder / "best/h.0").notes["step"] == step
    assert list(FastSae.load_many(folder, local=True)) == ["h.0"]
