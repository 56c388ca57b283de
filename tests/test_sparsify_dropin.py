"""Programs written for sparsify, with one import line changed: its README's, and the logic of its own tests."""

import dataclasses
import inspect
import json

import pytest
import torch
from coders import D, K, L, inputs
from datasets import Dataset
from models import make_model, save_model, token_rows
from test_cli import run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastsae
from fastsae.compat import sparsify_flags
from fastsae.compat.sparsify import (
    Sae,
    SaeConfig,
    SaeTrainer,
    SparseCoder,
    SparseCoderConfig,
    TrainConfig,
    Trainer,
    TranscoderConfig,
)
from fastsae.compat.sparsify.data import chunk_and_tokenize
from fastsae.errors import ConfigError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model("gpt2", tmp_path_factory.mktemp("model"))


def make_config(tmp_path, **options) -> TrainConfig:
    return TrainConfig(
        SaeConfig(expansion_factor=2, k=4), batch_size=4, log_to_wandb=False, save_dir=str(tmp_path), **options
    )


# ---- the README's programs ----


def test_the_training_example(tmp_path, model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = Dataset.from_dict({"text": ["def f(x):\n    return x\n" * 40] * 20})
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenized = chunk_and_tokenize(dataset, tokenizer, max_seq_len=32)
    assert tokenized[0]["input_ids"].shape == (32,)

    gpt = AutoModelForCausalLM.from_pretrained(model_folder)
    cfg = TrainConfig(SaeConfig(expansion_factor=2, k=4), batch_size=16, log_to_wandb=False)
    trainer = Trainer(cfg, tokenized, gpt)
    trainer.fit()
    assert trainer.global_step > 0
    saes = Sae.load_many("checkpoints/unnamed", local=True)
    assert list(saes) == list(trainer.saes) == ["h.0", "h.1", "h.2"]

    # "we can then gather the SAE activations for a model forward pass as follows"
    token_ids = tokenizer("Hello, world!", return_tensors="pt")
    with torch.inference_mode():
        outputs = gpt(**token_ids, output_hidden_states=True)
        latent_acts = []
        for sae, hidden_state in zip(saes.values(), outputs.hidden_states, strict=False):
            hidden_state = hidden_state.flatten(0, 1)
            latent_acts.append(sae.encode(hidden_state))
    for encoded in latent_acts:
        assert encoded.top_acts.shape == encoded.top_indices.shape == (len(hidden_state), 4)


def test_the_finetuning_example(tmp_path):
    """README: «--finetune» goes on from saved coders, here from Python, as sparsify's TrainConfig takes it."""
    model, rows = make_model("gpt2"), token_rows(24, 16)
    first = Trainer(make_config(tmp_path, hookpoints=["h.0", "h.1"], run_name="first"), rows, model)
    first.fit()
    saved = Sae.load_many(tmp_path / "first", local=True)
    cfg = make_config(
        tmp_path, hookpoints=["h.0", "h.1"], run_name="second", finetune=str(tmp_path / "first"), lr=1e-4
    )  # fmt: skip
    second = Trainer(cfg, rows, model)
    for name, sae in second.saes.items():
        for key, tensor in saved[name].state_dict().items():
            torch.testing.assert_close(sae.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    second.fit()
    for name, sae in Sae.load_many(tmp_path / "second", local=True).items():
        moved = (sae.encoder.weight - saved[name].encoder.weight).abs().max()
        assert 0 < moved < 0.05  # it went on, and from there
        torch.testing.assert_close(sae.b_dec, saved[name].b_dec, rtol=0, atol=0.05)  # not started anew


def test_loading_one(tmp_path):
    sae = Sae(D, SaeConfig(num_latents=L, k=K))
    sae.save_to_disk(tmp_path / "layers.10")
    again = Sae.load_from_disk(tmp_path / "layers.10", device="cpu", decoder=True)
    assert torch.equal(again.encoder.weight, sae.encoder.weight)
    assert SparseCoder is Sae
    assert SaeTrainer is Trainer


# ---- the logic of its test_encode.py and test_decode.py, with our class in its place ----


def test_encode():
    torch.manual_seed(42)
    sae = SparseCoder(64, SparseCoderConfig(num_latents=512, k=8, transcode=True))  # transcoders encode x itself
    with torch.no_grad():
        sae.encoder.bias.normal_()
    x = torch.randn(128, 64, requires_grad=True)
    values_naive, indices_naive = torch.topk(F.relu(sae.encoder(x)), 8, dim=1)
    naive = torch.autograd.grad(values_naive.sum(), [x, sae.encoder.weight, sae.encoder.bias])
    values, indices, _ = sae.encode(x)
    grads = torch.autograd.grad(values.sum(), [x, sae.encoder.weight, sae.encoder.bias])
    torch.testing.assert_close(values, values_naive)
    torch.testing.assert_close(indices, indices_naive)
    for mine, other in zip(grads, naive, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("d_in", [48, 64])  # Power of 2 and not
def test_decode(d_in):
    torch.manual_seed(0)
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=128, k=10))
    latents = torch.rand(2, 128)
    top_vals, top_idx = latents.topk(10)
    assert sae.W_dec is not None
    expected = torch.zeros(2, 128).scatter(1, top_idx, top_vals) @ sae.W_dec
    torch.testing.assert_close(sae.decode(top_vals, top_idx), expected)


# ---- the logic of its test_multiple_saes.py ----


def test_multi_seed_training(tmp_path):
    cfg = make_config(tmp_path, init_seeds=[0, 42], layers=[0, 1])
    trainer = Trainer(cfg, token_rows(8, 16), make_model("gpt2"))
    names = {f"h.{i}/seed{s}" for i in (0, 1) for s in (0, 42)}
    assert set(trainer.saes) == names
    initial = {name: sae.encoder.weight.detach().clone() for name, sae in trainer.saes.items()}
    trainer.fit()
    for name, sae in trainer.saes.items():
        assert not torch.equal(sae.encoder.weight, initial[name])
    assert not torch.equal(trainer.saes["h.0/seed0"].encoder.weight, trainer.saes["h.0/seed42"].encoder.weight)
    for name in names:
        assert (tmp_path / "unnamed" / name / "sae.safetensors").exists()


def test_hookpoint_names_do_not_collide(tmp_path):
    trainer = Trainer(make_config(tmp_path, hookpoints=["h.1", "h.1.mlp"]), token_rows(4, 16), make_model("gpt2"))
    assert list(trainer.saes) == ["h.1", "h.1.mlp"]
    before = {name: sae.encoder.weight.detach().clone() for name, sae in trainer.saes.items()}
    trainer.fit()
    assert all(not torch.equal(sae.encoder.weight, before[name]) for name, sae in trainer.saes.items())


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_end_to_end_losses_train_what_fastsaes_trainer_does(loss_fn, tmp_path):
    rows, model = token_rows(20, 8), make_model("gpt2")
    theirs = Trainer(make_config(tmp_path / "a", loss_fn=loss_fn, hookpoints=["h.1.mlp"]), rows, model)
    theirs.fit()
    cfg = fastsae.TrainConfig(
        fastsae.SaeConfig(expansion_factor=2, k=4), batch_size=4, loss_fn=loss_fn, hookpoints=("h.1.mlp",),
        optimizer="signum", save_dir=str(tmp_path / "b"),
    )  # fmt: skip
    ours = fastsae.Trainer(cfg, rows, model)
    ours.fit(progress=False)
    for name, parameter in ours.coders["h.1.mlp"].named_parameters():
        assert torch.equal(theirs.saes["h.1.mlp"].get_parameter(name), parameter), name
    records = [json.loads(line) for line in (tmp_path / "a/unnamed/metrics.jsonl").read_text().splitlines()]
    assert all(record["loss"] > 0 for record in records)


# ---- names and signatures ----


def test_configs_have_sparsifys_fields_and_defaults():
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed; pip install 'fastsae[interop]'")
    for ours, theirs in ((SparseCoderConfig, sparsify.SparseCoderConfig), (TrainConfig, sparsify.TrainConfig)):
        fields = {f.name: f for f in dataclasses.fields(ours)}
        assert list(fields)[: len(dataclasses.fields(theirs))] == [f.name for f in dataclasses.fields(theirs)]
        assert set(fields) - {f.name for f in dataclasses.fields(theirs)} <= {
            "matryoshka_widths"
        }  # more by default: none
        for other in dataclasses.fields(theirs):
            mine = fields[other.name]
            assert mine.default == other.default
            if other.default_factory is not dataclasses.MISSING:
                assert mine.default_factory() == other.default_factory()  # type: ignore[misc]
    for name in (
        "__init__",
        "encode",
        "decode",
        "forward",
        "load_many",
        "load_from_hub",
        "load_from_disk",
        "save_to_disk",
    ):
        theirs = inspect.signature(getattr(sparsify.SparseCoder, name)).parameters
        ours = list(inspect.signature(getattr(SparseCoder, name)).parameters.values())
        assert [p.name for p in ours][: len(theirs)] == list(theirs)
        assert all(p.default is not p.empty for p in ours[len(theirs) :])  # more only with defaults
    assert list(inspect.signature(Trainer).parameters) == list(inspect.signature(sparsify.Trainer).parameters)
    assert not set(sparsify.__all__) - set(dir(__import__("fastsae.compat.sparsify", fromlist=["Sae"])))


def test_config_translation():
    cfg = TrainConfig(
        SaeConfig(k=4), batch_size=16, lr=1e-3, exclude_tokens=[1], wandb_log_frequency=3, log_to_wandb=False
    )
    native = cfg.to_fastsae()
    assert (native.batch_size, native.lr, native.exclude_tokens, native.optimizer) == (16, 1e-3, (1,), "signum")
    assert (native.log_every, native.log_to, native.run_name) == (3, (), "unnamed")
    assert TranscoderConfig(k=3).transcode
    cfg.batch_size = 0  # mutable, as sparsify's
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        cfg.to_fastsae()
    values = {"k": 5, "d_in": 9}
    with pytest.raises(ConfigError, match="got d_in too"):
        SparseCoderConfig.from_dict(values)
    assert SparseCoderConfig.from_dict(values, drop_extra_fields=True).k == 5


def test_what_fastsae_does_not_have_is_said_at_birth(monkeypatch):
    from fastsae.compat.sparsify import config

    @dataclasses.dataclass(frozen=True)
    class Small:  # a fastsae without any of sparsify's experimental options
        sae: SaeConfig
        batch_size: int = 32

    monkeypatch.setattr(config.config, "TrainConfig", Small)
    with pytest.raises(ConfigError, match="k_decay_steps: this version of fastsae does only 0, got 10"):
        TrainConfig(SaeConfig(), k_decay_steps=10, log_to_wandb=False)


def test_without_wandb_a_run_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="fastsae"):
        assert TrainConfig(SaeConfig()).to_fastsae().log_to == ()
    assert "pip install wandb" in caplog.text


# ---- its command-line flags ----


@pytest.mark.parametrize(
    ("given", "translated"),
    [
        (["--log_to_wandb"], ["--log-to", "wandb"]),
        (["--log_to_wandb", "True"], ["--log-to", "wandb"]),
        (["--log_to_wandb", "False", "--k", "3"], ["--k", "3"]),
        (["--log_to_wandb=false"], []),
        (["--nolog_to_wandb", "x"], ["x"]),
        (["--wandb_log_frequency", "5"], ["--log-every", "5"]),
        (["--wandb_log_frequency=5"], ["--log-every=5"]),
        (["train", "gpt2", "--batch_size", "4"], ["train", "gpt2", "--batch_size", "4"]),
    ],
)
def test_flags_are_translated(given, translated):
    assert sparsify_flags.translate(given) == translated


def test_a_sparsify_command_line_trains(tmp_path, model_folder, capsys):
    Dataset.from_dict({"text": ["x = 1\n" * 50] * 40}).save_to_disk(tmp_path / "text")
    flags = "--hookpoints h.*.mlp.act --batch_size 4 --expansion_factor 2 --k 4 --ctx_len 16 --lr_warmup_steps 1"
    flags += f" --log_to_wandb False --wandb_log_frequency 1 --run_name run --save_dir {tmp_path} --max_examples 8"
    code, out, _ = run(capsys, "train", str(model_folder), str(tmp_path / "text"), *flags.split())
    assert code == 0
    assert "saved in" in out
    saes = Sae.load_many(tmp_path / "run", local=True)
    assert list(saes) == ["h.0.mlp.act", "h.1.mlp.act", "h.2.mlp.act"]
    width = saes["h.0.mlp.act"].d_in
    assert saes["h.0.mlp.act"](inputs().repeat(1, 1, width // D)).sae_out.shape == (5, 7, width)


def test_distribute_modules_is_sparsifys_flag_too():
    from fastsae.compat.sparsify import SaeConfig, TrainConfig

    assert TrainConfig(SaeConfig(), distribute_modules=True, log_to_wandb=False).to_fastsae().distribute_modules
    assert not TrainConfig(SaeConfig(), log_to_wandb=False).to_fastsae().distribute_modules
