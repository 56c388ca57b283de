"""The command: help at 80 columns, the main job end to end, and one-line errors with exit code 2."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from models import save_model

from fastsae import FastSae, __version__
from fastsae.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``fastsae ARGUMENTS``."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as exit_:
        code = exit_.code or 0
    captured = capsys.readouterr()
    return int(code), captured.out, captured.err


def one_line(err: str) -> str:
    return " ".join(err.split())


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_help_reads_well_at_80_columns():
    environment = {**os.environ, "COLUMNS": "80"}
    for arguments in (["--help"], ["train", "--help"], ["hookpoints", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "fastsae", *arguments], capture_output=True, text=True, env=environment, check=True
        )
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "…" not in done.stdout  # nothing is cut off
    done = subprocess.run(
        [sys.executable, "-m", "fastsae", "train", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "--expansion-factor" in done.stdout
    assert "--dead-feature-threshold" in done.stdout


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastsae {__version__}\n", "")


def test_hookpoints_lists_names_types_and_widths(capsys):
    code, out, _ = run(capsys, "hookpoints", "demo")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["h.0.mlp.c_fc", "Conv1D", "128", "512"] in rows
    assert ["wte", "Embedding", "-", "128"] in rows


@pytest.mark.parametrize(
    ("architecture", "options", "names"),
    [
        ("gpt2", ["--hookpoints", "h.*.mlp.act"], ["h.0.mlp.act", "h.1.mlp.act", "h.2.mlp.act"]),
        ("llama", ["--hookpoints", "layers.*.self_attn", "layers.0.mlp"],
         ["layers.0.mlp", "layers.0.self_attn", "layers.1.self_attn"]),
        ("bert", ["--hookpoints", "encoder.layer.0.attention,encoder.layer.?"],
         ["encoder.layer.0", "encoder.layer.0.attention", "encoder.layer.1"]),
        ("gpt2", ["--layer_stride", "2"], ["h.0", "h.2"]),
    ],
)  # fmt: skip
def test_trains_a_saved_model_on_text(tmp_path, capsys, architecture, options, names):
    model = save_model(architecture, tmp_path / "model")
    text = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(40)]
    Dataset.from_dict({"prose": text}).to_parquet(tmp_path / "data.parquet")
    code, out, err = run(
        capsys, "train", str(model), str(tmp_path / "data.parquet"), *options, "--text_column", "prose",
        "--ctx-len", "32", "--batch_size", "8", "--expansion_factor=2", "--k", "4", "--hf-token", "hf_secret",
        "--save-dir", str(tmp_path / "out"), "--run_name", "my-run",
    )  # fmt: skip
    assert code == 0, err
    folder = tmp_path / "out/my-run"
    assert str(folder) in out.replace("\n", "")
    assert all(name in out for name in names)
    coders = FastSae.load_many(folder, local=True)
    assert list(coders) == names
    assert all(coder.cfg.k == 4 and coder.num_latents == 2 * coder.d_in for coder in coders.values())
    config = json.loads((folder / "config.json").read_text())
    assert (config["sae"]["k"], config["batch_size"], config["text_column"]) == (4, 8, "prose")
    assert config["model"] == str(model)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_the_embedded_default(tmp_path, capsys):
    code, out, err = run(capsys, "train", "--max-tokens", "8192", "--layers", "1", "--save-dir", str(tmp_path))
    assert code == 0, err
    (folder,) = tmp_path.iterdir()
    coder = FastSae.load_from_disk(folder / "h.1")
    assert (coder.d_in, coder.num_latents, coder.cfg.k) == (128, 4096, 32)
    for word in ("held-out FVU", "L0", "dead %", "tokens", "seconds", "saved in", "next:", "h.1"):
        assert word in out
    assert f"report: {folder / 'report.html'}" in out
    assert "<title>" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "./nowhere"], "error: model: expected a folder or hub id, got './nowhere'"),
        (["train", "org/none"], "error: model: expected a Hugging Face hub id or a folder"),
        (["train", "demo", "./nowhere"], "error: dataset: expected a file, a folder or a hub id, got './nowhere'"),
        (["train", "--hookpoints", "h.*.mpl.act"], "close matches: h.5.mlp.act"),
        (["train", "--layers", "9"], "error: expected layers from 0 to 5, got 9"),
        (["train", "--layers", "x"], "error: layers: expected integers, got x"),
        (["train", "--k", "5000"], "error: h.0 (width 128): expected k <= number of latents, got k = 5000 and 4096"),
        (["train", "--activation", "groupmax", "--k", "33"], "divisible by k, got 4096 latents and k = 33; try --k 32"),
        (
            ["train", "--activation", "relu"],
            "error: activation: expected 'topk' or 'groupmax' or 'batchtopk', got 'relu'",
        ),
        (["train", "--save-dir", "/proc/nowhere"], "error: output: expected a folder that can be written"),
        (["train", "--text-column", "prose"], "expected a text column 'prose'"),
        (["train", "--transcode", "--hookpoints", "wte"], "wte: a transcoder expects a module whose input is a float"),
        (["train", "--exclude-tokens", "boss"], "expected a token id or one of bos, eos, pad"),
        (["train", "--exclude-tokens", "cls"], "expected a tokenizer with the token 'cls', got one that has"),
        (["train", "org/none", "--streaming"], "error: streaming: expected --max-tokens or --max-examples with it"),
        (["train", "--load-in-8bit", "--device", "cpu"], "error: load_in_8bit: expected a GPU to load the model on"),
        (["train", "--data-args", "x"], "error: data_args: expected key=value, got 'x'"),
        (["train", "demo", "./tokens.bin"], "error: dataset: expected a .bin file of token ids, got './tokens.bin'"),
        (["train", "--log-to", "mlflow"], "error: log_to: expected a list of 'wandb' or 'tensorboard'"),
        (["train", "--config", "nowhere.yaml"], "error: config: expected a YAML or JSON file, got nowhere.yaml"),
        (
            ["train", "--resume", "./nowhere"],
            "error: resume: expected a run's folder with config.json, got './nowhere'",
        ),
        (["train", "--resume", ".", "--k", "3"], "error: resume: expected no --k, a resumed run goes on with its own"),
        (["train", "gpt2", "--resume", "."], "error: resume: expected no --model, a resumed run goes on with its own"),
        (["train", "--set", "h.0:kk=3"], "error: set: expected a field of a coder, got 'kk' in 'h.0:kk=3'"),
        (["train", "--max-grad-norm", "0"], "error: max_grad_norm: expected a positive number, got 0"),
        (
            ["train", "--finetune", "./nowhere", "--max-tokens", "512", "--layers", "1"],
            "expected a run's folder or a hub id, got './nowhere'",
        ),
        (["train", "--k", "many"], "Invalid value for '--k'"),
        (["train", "--bogus", "1"], "No such option: --bogus"),
        (["hookpoints", "./nowhere"], "error: model: expected a folder or hub id"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in one_line(err)
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*"))  # a failed start leaves nothing behind


def test_a_model_alone_trains_on_sparsifys_default_dataset(tmp_path, capsys):
    model = save_model("gpt2", tmp_path / "model")
    code, _, err = run(capsys, "train", str(model), "--save-dir", str(tmp_path / "out"))
    assert code == 2  # there is no hub here
    assert "got 'EleutherAI/SmolLM2-135M-10B'" in one_line(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    code, _, err = run(capsys, "train", "--device", "cuda")
    assert (code, "expected a GPU for 'cuda'" in one_line(err)) == (2, True)


def test_non_finite_activations(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from fastsae import demo

    save_model("gpt2", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    code, _, err = run(
        capsys, "train", str(tmp_path / "model"), demo.DATASET, "--ctx-len", "32", "--max-examples", "32",
        "--expansion-factor", "2", "--k", "4", "--batch-size", "4", "--save-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2
    assert "error: h.1, step 1: expected finite activations" in one_line(err)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_tokens_are_excluded_by_name(tmp_path, capsys):
    code, _, err = run(
        capsys, "train", "--max-tokens", "2048", "--layers", "1", "--k", "4", "--expansion-factor", "2",
        "--exclude-tokens", "9", "eos", "--save-dir", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    (config,) = tmp_path.glob("*/config.json")
    assert json.loads(config.read_text())["exclude_tokens"] == [0, 9]
    assert "left out: eos (ids 0, 9)" in one_line(err)


def test_trackers_are_checked_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("fastsae.run.load_model", lambda *_: pytest.fail("too late"))
    code, _, err = run(capsys, "train", "--log-to", "wandb", "--save-dir", str(tmp_path / "out"))
    assert (code, "expected the package 'wandb'" in one_line(err)) == (2, True)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_implementation_is_checked_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("fastsae.run.load_model", lambda *_: pytest.fail("too late"))
    code, _, err = run(capsys, "train", "--implementation", "triton", "--save-dir", str(tmp_path / "out"))
    assert (code, "error: implementation 'triton' expects" in one_line(err)) == (2, True)
    assert not list(tmp_path.rglob("*"))


def test_a_list_may_stand_before_the_model(tmp_path, capsys):
    code, out, err = run(
        capsys, "train", "--hookpoints", "h.1.mlp", "demo", "--max-tokens", "2048", "--k", "4",
        "--expansion-factor", "2", "--save-dir", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert "h.1.mlp" in out


def test_a_layer_that_is_called_again_and_again_is_named(tmp_path, capsys):
    from transformers import AlbertConfig, AlbertModel, AutoTokenizer

    from fastsae import demo

    config = AlbertConfig(
        vocab_size=4096, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AlbertModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    code, _, err = run(
        capsys, "train", str(tmp_path / "model"), str(tmp_path / "a.txt"), "--hookpoints", layer,
        "--ctx-len", "32", "--k", "4", "--expansion-factor", "2", "--save-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    assert (
        f"{layer}: the model calls it 3 times in a forward (shared weights); one coder is trained on all"
        in one_line(err)
    )
