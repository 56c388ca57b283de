"""Trainer: real models, real steps, against the same mathematics written out by hand."""

import json
import time
from dataclasses import replace

import pytest
import torch
from models import make_model, token_rows

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, TranscoderConfig
from fastsae.errors import ArtifactError, ConfigError, HookpointError, NonFiniteError
from fastsae.run_folder import claimed_run_folder, create_run_folder

SMALL = SaeConfig(num_latents=64, k=4)


def config(tmp_path, **options) -> TrainConfig:
    options.setdefault("sae", SMALL)
    options.setdefault("batch_size", 4)
    return TrainConfig(save_dir=str(tmp_path), run_name="run", **options)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": t.clone() for name, c in trainer.coders.items() for key, t in c.state_dict().items()}


@pytest.mark.parametrize(
    ("architecture", "pattern", "names"),
    [
        ("gpt2", "h.*.mlp.act", ["h.0.mlp.act", "h.1.mlp.act", "h.2.mlp.act"]),
        ("llama", "layers.*.self_attn", ["layers.0.self_attn", "layers.1.self_attn"]),
        ("bert", "encoder.layer.?.output", ["encoder.layer.0.output", "encoder.layer.1.output"]),
    ],
)
def test_trains_every_architecture(tmp_path, architecture, pattern, names):
    trainer = Trainer(config(tmp_path, hookpoints=(pattern,), lr=0.001), token_rows(44, 16), make_model(architecture))
    assert list(trainer.coders) == names
    summary = trainer.fit(progress=False)
    records = [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == trainer.total_steps == 11
    assert [coder.name for coder in summary.coders] == names
    for coder in summary.coders:
        assert 0 < coder.fvu < 1
        assert coder.l0 <= 4
        assert coder.tokens == 42 * 16  # two of the 44 sequences are held out
        saved = FastSae.load_from_disk(summary.folder / coder.name)
        assert saved.W_dec is not None
        torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(64), atol=1e-6, rtol=0)
        assert saved.notes["hookpoint"] == coder.name
        assert (saved.notes["step"], saved.notes["tokens"]) == (11, 42 * 16)


def test_what_is_no_model_is_said_at_once(tmp_path):
    cfg = TrainConfig(SaeConfig(num_latents=16, k=2), save_dir=str(tmp_path))
    for model in ("demo", torch.nn.Linear(3, 3)):
        with pytest.raises(ConfigError, match=r"model: expected a model of transformers, got (str 'demo'|Linear 'Lin)"):
            Trainer(cfg, [{"input_ids": [1, 2]}], model)


def test_training_lowers_fvu(tmp_path):
    rows = token_rows(200, 16)
    trainer = Trainer(config(tmp_path, hookpoints=("h.1",), lr=0.01, log_every=5), rows, make_model("gpt2"))
    summary = trainer.fit(progress=False)
    records = [json.loads(line) for line in (summary.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["fvu/h.1"] < 0.7 * records[0]["fvu/h.1"]
    assert summary.coders[0].fvu < 0.7 * records[0]["fvu/h.1"]


def test_two_steps_equal_the_same_steps_by_hand(tmp_path):
    model, rows = make_model("gpt2"), token_rows(8, 16)
    cfg = config(tmp_path, hookpoints=("h.1",), lr=0.01, held_out=0)
    trainer = Trainer(cfg, rows, model)
    torch.manual_seed(0)
    twin = FastSae(32, SMALL)
    optimizer = torch.optim.Adam(twin.parameters())
    for step, lr in enumerate([0.01, 0.005]):  # no warm-up in a run of two steps; decay to 0 after the last
        ids = rows[4 * step : 4 * step + 4]["input_ids"]
        trainer.train_step([{"input_ids": ids}])
        with torch.no_grad():
            y = model.transformer(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
        if step == 0:
            twin.b_dec.data = y.mean(0)
        assert twin.W_dec is not None
        twin(y).fvu.backward()
        assert twin.W_dec.grad is not None
        with torch.no_grad():
            twin.W_dec.grad -= (twin.W_dec.grad * twin.W_dec).sum(1, keepdim=True) * twin.W_dec
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            twin.W_dec.div_(twin.W_dec.norm(dim=1, keepdim=True))
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(trainer.coders["h.1"].state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_accumulated_and_chunked_steps_equal_whole_ones(tmp_path):
    rows = token_rows(8, 16)
    batch = {"input_ids": rows[:8]["input_ids"]}

    def after(batches, **options):
        trainer = Trainer(config(tmp_path, hookpoints=("h.1",), lr=0.01, **options), rows, make_model("gpt2"))
        trainer.coders["h.1"].b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
        trainer.first_batches.initialised.add("h.1")
        trainer.train_step(batches)
        return weights(trainer), trainer.read_metrics()["fvu"]

    whole, whole_fvu = after([batch])
    chunked, chunked_fvu = after([batch], micro_acc_steps=3)
    assert chunked_fvu == pytest.approx(whole_fvu, rel=1e-5)
    twice, twice_fvu = after([batch, batch], grad_acc_steps=2)
    assert twice_fvu == pytest.approx(whole_fvu, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(chunked[name], tensor, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(twice[name], tensor, atol=2e-5, rtol=1e-3)


def test_the_schedule_ends_with_the_run_also_under_accumulation(tmp_path):
    rows = token_rows(22, 8)
    trainer = Trainer(config(tmp_path, hookpoints=("h.0",), grad_acc_steps=2, batch_size=3), rows, make_model("gpt2"))
    assert trainer.total_steps == 4  # 21 sequences: 7 batches, the last step has one
    trainer.fit(progress=False)
    assert trainer.step == 4
    assert trainer.schedule.get_last_lr() == [0.0, 0.0]


def test_bias_starts_at_the_first_batchs_mean_without_excluded_tokens(tmp_path):
    model, rows = make_model("gpt2"), token_rows(4, 16)
    excluded = rows[0]["input_ids"][:3]
    trainer = Trainer(
        config(tmp_path, hookpoints=("h.0",), exclude_tokens=tuple(excluded.tolist()), lr=1e-12), rows, model
    )
    ids = rows[:4]["input_ids"]
    trainer.train_step([{"input_ids": ids}])
    with torch.no_grad():
        hidden = model.transformer(ids, output_hidden_states=True).hidden_states[1]
    kept = hidden[~torch.isin(ids, excluded)]
    assert trainer.tokens == len(kept) < ids.numel()
    torch.testing.assert_close(trainer.coders["h.0"].b_dec.data, kept.mean(0), atol=1e-5, rtol=1e-5)


def test_padding_is_neither_attended_nor_trained_on(tmp_path):
    rows = token_rows(4, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 4)
    trainers = []
    for ids in (rows[:4]["input_ids"], rows[:4]["input_ids"].clone()):
        trainer = Trainer(config(tmp_path, hookpoints=("encoder.layer.1",)), rows, make_model("bert"))
        if trainers:
            ids[:, 4:] = 9  # other padding must change nothing
        trainer.train_step([{"input_ids": ids, "attention_mask": mask}])
        trainers.append(trainer)
    assert trainers[0].tokens == 16
    for name, tensor in weights(trainers[0]).items():
        torch.testing.assert_close(weights(trainers[1])[name], tensor)


def test_transcoders_learn_output_from_input(tmp_path):
    model, rows = make_model("gpt2"), token_rows(120, 16)
    cfg = config(tmp_path, sae=TranscoderConfig(num_latents=64, k=8), hookpoints=("h.1.mlp",), lr=0.002, log_every=1)
    trainer = Trainer(cfg, rows, model)
    seen = []
    handle = model.transformer.h[1].mlp.register_forward_hook(
        lambda _m, args, out: seen.append((args[0].flatten(0, 1), out.flatten(0, 1)))
    )
    summary = trainer.fit(progress=False)
    handle.remove()
    first = json.loads((summary.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["fvu/h.1.mlp"] == pytest.approx(1.0, abs=1e-4)  # a zero decoder gives the mean
    assert summary.coders[0].fvu < 0.95
    coder = trainer.coders["h.1.mlp"]
    x, y = seen[0]
    with torch.no_grad():
        assert coder(x, y).fvu < 0.95


@pytest.mark.parametrize(("hookpoint", "widths"), [("h.0.mlp.c_fc", (32, 128)), ("h.0.mlp.c_proj", (128, 32))])
@pytest.mark.parametrize("parts", [1, 3])
def test_transcoders_of_two_widths_take_the_steps_taken_by_hand(tmp_path, hookpoint, widths, parts):
    model, rows = make_model("gpt2"), token_rows(8, 16)
    sae = TranscoderConfig(num_latents=64, k=4, skip_connection=True, multi_topk=True)
    cfg = config(tmp_path, sae=sae, hookpoints=(hookpoint,), lr=0.01, held_out=0, micro_acc_steps=parts)
    trainer = Trainer(cfg, rows, model)
    twin = FastSae(widths[0], sae, d_out=widths[1])
    for parameter in twin.parameters():  # a new coder's b_dec has a gradient of rounding errors: Adam would follow them
        parameter.data.normal_(std=0.1)
    trainer.coders[hookpoint].load_state_dict(twin.state_dict())
    trainer.first_batches.initialised.add(hookpoint)
    optimizer = torch.optim.Adam(twin.parameters())
    seen = []
    module = model.transformer.get_submodule(hookpoint)
    with module.register_forward_hook(lambda _m, args, out: seen.append((args[0].flatten(0, 1), out.flatten(0, 1)))):
        for step, lr in enumerate([0.01, 0.005]):
            trainer.train_step([{"input_ids": rows[4 * step : 4 * step + 4]["input_ids"]}])
            x, y = seen[-1]
            out = twin(x, y)
            (out.fvu + out.multi_topk_fvu / 8).backward()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
    trained = trainer.coders[hookpoint]
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=2e-5, rtol=1e-3)

    trained.save_to_disk(tmp_path / "coder")
    again = FastSae.load_from_disk(tmp_path / "coder")
    assert (again.d_in, again.d_out) == widths
    assert again(x, y).sae_out.equal(trained(x, y).sae_out)


def test_transcoders_refuse_modules_without_an_input(tmp_path):
    with pytest.raises(HookpointError, match="wte: a transcoder expects a module whose input is a float tensor"):
        Trainer(
            config(tmp_path, sae=TranscoderConfig(num_latents=64, k=2), hookpoints=("wte",)),
            token_rows(4, 8),
            make_model("gpt2"),
        )


def test_several_seeds_are_separate_coders_from_one_pass(tmp_path):
    rows = token_rows(40, 8)
    both = Trainer(config(tmp_path, hookpoints=("h.0", "h.1"), init_seeds=(0, 7)), rows, make_model("gpt2"))
    assert list(both.coders) == ["h.0/seed0", "h.0/seed7", "h.1/seed0", "h.1/seed7"]
    both.fit(progress=False)
    alone = Trainer(
        TrainConfig(
            sae=SMALL, batch_size=4, save_dir=str(tmp_path), run_name="b", hookpoints=("h.1",), init_seeds=(7,)
        ),
        rows,
        make_model("gpt2"),
    )
    alone.fit(progress=False)
    for name, tensor in alone.coders["h.1"].state_dict().items():
        assert torch.equal(both.coders["h.1/seed7"].state_dict()[name], tensor)
    assert list(FastSae.load_many(tmp_path / "run", local=True)) == list(both.coders)


def test_auxk_moves_latents_that_never_fired(tmp_path):
    rows = token_rows(12, 16)

    def moved_rows(alpha):
        cfg = config(
            tmp_path, sae=SaeConfig(num_latents=256, k=2), hookpoints=("h.2",), lr=0.01,
            auxk_alpha=alpha, dead_feature_threshold=100,
        )  # fmt: skip
        trainer = Trainer(cfg, rows, make_model("gpt2"))
        start = weights(trainer)["h.2/encoder.weight"]
        for i in range(3):  # 64 tokens a step: dead latents are known from the third step on
            trainer.train_step([{"input_ids": rows[4 * i : 4 * i + 4]["input_ids"]}])
        never_fired = trainer.metrics["h.2"].tokens_since_fired == trainer.tokens
        assert never_fired.any()
        return (weights(trainer)["h.2/encoder.weight"] != start).any(1)[never_fired]

    assert not moved_rows(0.0).any()
    assert moved_rows(1.0).any()


def test_layers_and_stride(tmp_path):
    rows, model = token_rows(4, 8), make_model("gpt2")
    assert list(Trainer(config(tmp_path), rows, model).coders) == ["h.0", "h.1", "h.2"]
    assert list(Trainer(config(tmp_path, layers=(2,)), rows, model).coders) == ["h.2"]
    assert list(Trainer(config(tmp_path, layer_stride=2), rows, model).coders) == ["h.0", "h.2"]
    with pytest.raises(ConfigError, match=r"h.0 \(width 32\): expected k <= number of latents"):
        Trainer(config(tmp_path, sae=SaeConfig(expansion_factor=1, k=33)), rows, model)


def test_non_finite_activations_name_hookpoint_and_step_and_overwrite_nothing(tmp_path):
    model, rows = make_model("gpt2"), token_rows(40, 8)
    trainer = Trainer(config(tmp_path, hookpoints=("h.*",), save_every=3, held_out=0), rows, model)
    model.transformer.h[1].register_forward_hook(
        lambda _m, _a, out: torch.full_like(out, float("inf")) if trainer.step >= 4 else out
    )
    with pytest.raises(NonFiniteError, match="h.1, step 5: expected finite activations"):
        trainer.fit(progress=False)
    for name in trainer.coders:
        saved = FastSae.load_from_disk(tmp_path / "run" / name)
        assert saved.notes["step"] == 3
        assert all(tensor.isfinite().all() for tensor in saved.state_dict().values())


def test_a_run_folder_is_never_overwritten(tmp_path):
    rows = token_rows(4, 8)
    Trainer(config(tmp_path, hookpoints=("h.0",)), rows, make_model("gpt2")).fit(progress=False)
    before = (tmp_path / "run/h.0/sae.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="already holds files; choose another --run-name"):
        Trainer(config(tmp_path, hookpoints=("h.0",), lr=0.1), rows, make_model("gpt2")).fit(progress=False)
    assert (tmp_path / "run/h.0/sae.safetensors").read_bytes() == before


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260131-235959")
    cfg = TrainConfig(SMALL, hookpoints=("h.0",), save_dir=str(tmp_path / "runs"))
    folders = [Trainer(cfg, token_rows(4, 8), make_model("gpt2")).fit(progress=False).folder for _ in range(3)]
    assert [folder.name for folder in folders] == [f"GPT2LMHeadModel-20260131-235959{i}" for i in ("", "-2", "-3")]
    with claimed_run_folder(cfg, "gpt2") as one, claimed_run_folder(cfg, "gpt2") as other:
        assert (one.name, other.name) == ("gpt2-20260131-235959", "gpt2-20260131-235959-2")
    unnamed = replace(cfg, run_name="")
    assert len({create_run_folder(unnamed, "gpt2") for _ in range(2)}) == 2
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="expected a folder that can be written"):
        create_run_folder(replace(cfg, save_dir=str(tmp_path / "file")), "gpt2")


def test_empty_data(tmp_path):
    with pytest.raises(ArtifactError, match="expected at least one sequence"):
        Trainer(config(tmp_path), token_rows(4, 8).select([]), make_model("gpt2"))


def test_a_dataset_shorter_than_a_batch_trains(tmp_path):
    trainer = Trainer(config(tmp_path, hookpoints=("h.0",), batch_size=64), token_rows(3, 8), make_model("gpt2"))
    assert trainer.fit(progress=False).coders[0].tokens == 24


def test_runs_are_reproducible_bit_by_bit(tmp_path):
    files = []
    for name in ("a", "b"):
        trainer = Trainer(config(tmp_path / name, hookpoints=("h.1",)), token_rows(24, 16), make_model("gpt2"))
        files.append((trainer.fit(progress=False).folder / "h.1/sae.safetensors").read_bytes())
    assert files[0] == files[1]


def test_weights_broken_by_the_last_update_are_not_saved(tmp_path):
    trainer = Trainer(config(tmp_path, hookpoints=("h.0", "h.1"), lr=1e38), token_rows(4, 8), make_model("gpt2"))
    with pytest.raises(NonFiniteError, match="h.0, step 1: expected finite weights"):
        trainer.fit(progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_logged_rate_is_the_one_used(tmp_path):
    trainer = Trainer(config(tmp_path, hookpoints=("h.0",), lr=0.01), token_rows(4, 8), make_model("gpt2"))
    folder = trainer.fit(progress=False).folder
    assert json.loads((folder / "metrics.jsonl").read_text())["lr"] == pytest.approx(0.01)


def test_nothing_to_train_on_saves_nothing(tmp_path):
    rows = token_rows(24, 8).map(lambda row: {"input_ids": [7] * 8})
    trainer = Trainer(config(tmp_path, hookpoints=("h.0",), exclude_tokens=(7,)), rows, make_model("gpt2"))
    with pytest.raises(ArtifactError, match="all are excluded or masked"):
        trainer.fit(progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_to_train_on_shows_before_the_end(tmp_path):
    rows = token_rows(400, 8).map(lambda row: {"input_ids": [7] * 8})
    cfg = config(tmp_path, hookpoints=("h.0",), exclude_tokens=(7,), grad_acc_steps=2)
    trainer = Trainer(cfg, rows, make_model("gpt2"))
    with pytest.raises(ArtifactError, match="got none in 32 batches: all are excluded or masked"):
        trainer.fit(progress=False)
    assert trainer.step == 16 < trainer.total_steps


def test_tokens_of_another_model_are_refused(tmp_path):
    rows = token_rows(4, 8).map(lambda row: {"input_ids": [5000] * 8})
    with pytest.raises(ArtifactError, match="from 0 to 4095, got 5000 to 5000; was it tokenised for another model"):
        Trainer(config(tmp_path, hookpoints=("h.0",)), rows, make_model("gpt2")).fit(progress=False)


def test_run_names_stay_inside_the_folder(tmp_path):
    cfg = TrainConfig(sae=SMALL, hookpoints=("h.0",), save_dir=str(tmp_path / "out"), run_name="../escaped")
    with pytest.raises(ArtifactError, match="expected one folder name inside --save-dir"):
        Trainer(cfg, token_rows(4, 8), make_model("gpt2")).fit(progress=False)
    assert not (tmp_path / "escaped").exists()
