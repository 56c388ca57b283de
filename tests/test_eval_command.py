"""``fastsae eval`` end to end: held-out data found again, folders side by side, eval.json, mistakes."""

import json
import shutil

import pytest
import torch
from models import make_model, save_model
from test_cli import one_line, run

from fastsae import FastSae, RunConfig, SaeConfig, TrainConfig, Trainer, demo, load_language_model, load_model
from fastsae.data import load_tokens
from fastsae.errors import ArtifactError
from fastsae.eval.tokens import evaluation_tokens
from fastsae.model import load_tokenizer
from fastsae.rows import split_held_out
from fastsae.saved import check_origin, default_model, load_coders, run_record

DATA = {"ctx_len": 32, "max_tokens": 2560}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run on the demo: (its folder, the rows that its trainer held out)."""
    folder = tmp_path_factory.mktemp("runs")
    run = RunConfig(device="cpu", **DATA)
    model = load_model("demo", run)
    rows = load_tokens("stdlib", run, load_tokenizer("demo", run), model.config)
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4), hookpoints=("h.1", "h.2.mlp"), batch_size=8, save_dir=str(folder), run_name="a"
    )
    origin = {"model": "demo", "dataset": "stdlib", **run.to_dict()}
    trainer = Trainer(cfg, rows, model, origin=origin)
    trainer.fit(progress=False)
    _, held_out = split_held_out(rows, cfg.held_out)
    return folder / "a", [row["input_ids"].tolist() for row in held_out.take(len(held_out))]


def test_the_command(trained, capsys, tmp_path):
    folder, held_out = trained
    code, out, err = run(capsys, "eval", str(folder), "--device", "cpu")
    assert code == 0, err
    assert f"{len(held_out)} sequences of stdlib held out of training" in one_line(err)
    for word in ("FVU", "expl. var", "dead %", "recovered", "KL", "all 2 together", "h.2.mlp", "saved in"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80
    saved = json.loads((folder / "eval.json").read_text())
    assert (saved["model"], saved["sequences"], saved["tokens"]) == ("demo", len(held_out), 32 * len(held_out))
    first = saved["coders"][0]
    fvu = first["reconstruction"]["fvu"]
    assert fvu["low"] < fvu["value"] < fvu["high"]
    assert first["reconstruction"]["explained_variance"]["value"] == pytest.approx(1 - fvu["value"])
    assert first["cross_entropy"]["clean"] == saved["together"][0]["cross_entropy"]["clean"]
    assert first["cross_entropy"]["clean"]["value"] < first["cross_entropy"]["grafted"]["value"]

    code, out, _ = run(
        capsys, "eval", str(folder / "h.1"), "demo", "stdlib", "--no-ce", "--compare", str(folder), "--hookpoints",
        "h.1", "--sequences", "3", "--ctx-len", "16", "--output", str(tmp_path / "two.json"),
    )  # fmt: skip
    assert code == 0
    both = json.loads((tmp_path / "two.json").read_text())
    assert [(c["coders"], c["name"]) for c in both["coders"]] == [("h.1", "h.1"), ("a", "h.1")]
    assert both["coders"][0]["reconstruction"] == both["coders"][1]["reconstruction"]
    assert (both["sequences"], both["tokens"]) == (3, 48)
    assert both["coders"][0]["cross_entropy"] is None


def rows_of(data):
    return [row["input_ids"].tolist() for row in data]


def test_the_sequences_are_those_that_training_held_out(trained):
    folder, held_out = trained
    record, config = run_record(str(folder)), load_language_model("demo", RunConfig(device="cpu")).config
    assert run_record(str(folder / "h.1")) == record

    def choose(dataset=None, sequences=5, **options):
        return evaluation_tokens(
            dataset, record, options, lambda: load_tokenizer("demo", RunConfig()), config, sequences=sequences
        )

    rows, where = choose()
    assert rows_of(rows) == held_out
    assert len(held_out) == 4  # a twentieth of 80
    assert "held out" in where
    assert rows_of(choose("stdlib")[0]) == held_out
    assert rows_of(choose(max_tokens=64)[0]) == held_out[:2]
    other, where = choose("stdlib", shuffle_seed=1)
    assert len(other) == 5
    assert "held out" not in where
    assert len(other[0]["input_ids"]) == 32  # as long as those trained on
    with pytest.raises(ArtifactError, match="do not say what they were trained on"):
        evaluation_tokens(None, {}, {}, lambda: None, config, sequences=5)


def test_an_encoder_is_evaluated_without_losses(tmp_path, capsys):
    model = save_model("bert", tmp_path / "bert")
    FastSae(32, SaeConfig(num_latents=64, k=4)).save_to_disk(tmp_path / "coders/encoder.layer.1")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 60)
    code, out, err = run(
        capsys, "eval", str(tmp_path / "coders"), str(model), str(tmp_path / "text.txt"), "--ctx-len", "16"
    )
    assert code == 0, err
    assert "losses are left out" in one_line(err)
    assert "encoder.layer.1" in out
    assert "recovered" not in out


def test_a_model_without_its_head_is_refused(tmp_path):
    make_model("gpt2").transformer.save_pretrained(tmp_path / "tied")
    assert load_language_model(str(tmp_path / "tied"), RunConfig(device="cpu")).lm_head is not None  # = embeddings
    make_model("llama").model.save_pretrained(tmp_path / "untied")
    with pytest.raises(ArtifactError, match="with its LM head, got one without lm_head.weight, which would be random"):
        load_language_model(str(tmp_path / "untied"), RunConfig(device="cpu"))


def test_origins(tmp_path):
    coder = FastSae(8, SaeConfig(num_latents=16, k=2))
    check_origin("h.0", coder, "anything")  # sparsify's coders say nothing
    coder.notes = {"model": "demo", "hookpoint": "h.0"}
    check_origin("h.0/seed1", coder, str(demo.MODEL_DIR))
    coder.save_to_disk(tmp_path / "elsewhere")
    assert list(load_coders(str(tmp_path / "elsewhere"))) == ["h.0"]
    assert torch.equal(load_coders(str(tmp_path))["elsewhere"].W_dec, coder.W_dec)


def test_the_model_is_the_runs_or_what_all_coders_name():
    coders = [FastSae(8, SaeConfig(num_latents=16, k=2)) for _ in range(2)]
    assert default_model({"model": "gpt2"}, coders) == "gpt2"
    coders[0].notes = {"model": "demo"}
    assert default_model({}, coders[:1]) == "demo"
    coders[1].notes = {"model": "gpt2"}
    for unclear in (coders, [FastSae(8, SaeConfig(num_latents=16, k=2))], []):
        with pytest.raises(ArtifactError, match="do not say which model they were trained on; name one"):
            default_model({}, unclear)


def test_coders_away_from_their_run_know_their_model(trained, capsys, tmp_path):
    shutil.copytree(trained[0] / "h.1", tmp_path / "h.1")
    code, _, err = run(capsys, "eval", str(tmp_path))
    assert code == 2
    assert "dataset" in one_line(err)
    output = str(tmp_path / "eval.json")
    code, _, err = run(
        capsys, "eval", str(tmp_path), "demo", "stdlib", "--no-ce", "--sequences", "2", "--output", output
    )
    assert code == 0, err
    assert json.loads((tmp_path / "eval.json").read_text())["model"] == "demo"


def test_other_libraries_coders_are_read(tmp_path):
    from fastsae.compat.convert import convert

    coder = FastSae(8, SaeConfig(num_latents=16, k=2))
    for name in ("h.0", "h.1.mlp"):
        coder.notes = {"model": "demo", "hookpoint": name}
        coder.save_to_disk(tmp_path / "run" / name)
    convert(tmp_path / "run", tmp_path / "theirs", "saelens")
    coders = load_coders(str(tmp_path / "theirs"), hookpoints=("h.*.mlp",))
    assert list(coders) == ["h.1.mlp"]
    assert torch.equal(coders["h.1.mlp"].W_dec, coder.W_dec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "./nowhere", "demo"], "error: coders: expected a run's folder or a hub id, got './nowhere'"),
        (["eval", "nowhere"], "error: coders: expected a run's folder or a hub id, got 'nowhere'"),
        (["eval", "RUN", "./nowhere"], "error: model: expected a folder or hub id, got './nowhere'"),
        (["eval", "RUN", "--hookpoints", "h.7"], "error: expected coders matching 'h.7'"),
        (["eval", "RUN", "GPT2"], "got one trained on demo"),
        (["eval", "RUN", "--dense-above", "2"], "error: dense_above: expected a share above 0 and at most 1, got 2"),
        (["eval", "RUN", "--compare", "RUN"], "error: compare: expected other coders than"),
        (["eval"], "Missing argument 'coders'"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, arguments, message):
    save_model("gpt2", tmp_path / "gpt2")
    names = {"RUN": str(trained[0]), "GPT2": str(tmp_path / "gpt2")}
    code, _, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in one_line(err).replace("│ ", "")
    assert "Traceback" not in err
