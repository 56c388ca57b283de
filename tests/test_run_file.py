"""Runs described in files: what is read, what is refused, and that a saved run reads back as itself."""

import json

import pytest

from fastsae.cli import CONFIGS, main
from fastsae.coder_config import SaeConfig
from fastsae.config import TrainConfig
from fastsae.errors import ConfigError
from fastsae.options import build
from fastsae.run_config import RunConfig
from fastsae.run_file import read_run_file


def read(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return read_run_file(tmp_path / name, CONFIGS)


def test_names_and_types(tmp_path):
    values = read(
        tmp_path,
        """
        model: gpt2
        hookpoints: ["h.*.mlp", h.0]
        sae: {k: 64, normalize-decoder: no}
        lr: 2e-4          # PyYAML reads this as text
        batch-size: 8
        exclude_tokens: [bos, 5]
        data_args: {name: wiki}
        revision: null
        """,
    )
    assert values["model"] == "gpt2"
    cfg = build(TrainConfig, {**values, "exclude_tokens": ()}, sae=build(SaeConfig, values))
    assert (cfg.hookpoints, cfg.lr, cfg.batch_size) == (("h.*.mlp", "h.0"), 2e-4, 8)
    assert (cfg.sae.k, cfg.sae.normalize_decoder) == (64, False)
    assert values["exclude_tokens"] == ["bos", 5]
    assert build(RunConfig, values).data_args == ("name=wiki",)
    assert "revision" not in values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hookpoint: h.0", "run.yaml: expected options' names, got 'hookpoint'; did you mean hookpoints"),
        ("sae: {kk: 3}", "got 'kk'"),
        ("k: 3\nsae: {k: 4}", "expected k once, got it twice"),
        ("hf_token: hf_x", "expected no access token in a file"),
        ("lr: {a: 1}", "expected a value or a list for 'lr'"),
        ("- a", "expected key: value pairs in .*, got list"),
        ("", "expected key: value pairs in .*, got NoneType"),
        ("a: [1", "run.yaml is not readable: while parsing"),
        ("!!python/object/apply:os.system [ls]", "is not readable: could not determine a constructor"),
    ],
)
def test_refusals(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="expected a YAML or JSON file, got .*nothing.yaml: No such file"):
        read_run_file(tmp_path / "nothing.yaml", CONFIGS)
    with pytest.raises(ConfigError, match="run.json is not readable"):
        read(tmp_path, "{", "run.json")
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9")
    with pytest.raises(ConfigError, match="latin.yaml is not readable: .*utf-8"):
        read_run_file(tmp_path / "latin.yaml", CONFIGS)


def test_a_saved_run_reads_back_as_itself_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "layers: 1\nsae: {k: 4, expansion_factor: 2}\nmax_tokens: 2048\nexclude_tokens: eos\nlr: 1e-3\n"
    )
    for arguments in (
        ["run.yaml", "--run-name", "one", "--lr", "1e-5", "--hf-token", "hf_secret"],
        ["checkpoints/one/config.json", "--run-name", "two"],
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--config", *arguments])
    one, two = (json.loads((tmp_path / f"checkpoints/{name}/config.json").read_text()) for name in ("one", "two"))
    assert (one["sae"]["k"], one["lr"], one["exclude_tokens"], one["batch_size"]) == (4, 1e-5, [0], 8)
    assert {**one, "run_name": "two"} == two
    files = [tmp_path / f"checkpoints/{name}/h.1/sae.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()
