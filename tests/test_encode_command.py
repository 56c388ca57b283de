"""``fastsae encode``: the strongest latents per token, against encoding the model's own hidden states."""

import json

import pytest
import torch
from models import make_model, save_model
from test_cli import one_line, run
from test_eval import make_coder

from fastsae import FastSae, RunConfig, load_model, load_tokenizer, strongest_latents
from fastsae.errors import CheckpointError
from fastsae.token_text import visible

TEXT = "def area(self):\n    return self.width * 2"


@pytest.fixture
def saved(tmp_path):
    """Coders of the demo model, beside each other: a residual stream and a transcoder."""
    for name, coder in {"h.2": make_coder(128), "h.3.mlp": make_coder(128, transcode=True)}.items():
        coder.notes = {"model": "demo", "hookpoint": name}
        coder.save_to_disk(tmp_path / "run" / name)
    return tmp_path / "run"


def test_json_is_what_the_coder_says_of_the_hidden_states(saved, capsys):
    code, out, err = run(
        capsys, "encode", str(saved), "demo", "--text", TEXT, "--json", "--top", "3", "--device", "cpu"
    )
    assert code == 0, err
    record = json.loads(out)
    texts = [token["text"] for token in record["tokens"]]
    assert "".join(texts[1:]) == TEXT
    assert list(record["coders"]) == ["h.2", "h.3.mlp"]
    cfg = RunConfig(device="cpu", dtype="float32")
    tokenizer, model = load_tokenizer("demo", cfg), load_model("demo", cfg)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]])
    assert [token["id"] for token in record["tokens"]] == ids[0].tolist()
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[3][0]  # after h.2
        acts, indices, _ = FastSae.load_from_disk(saved / "h.2").encode(hidden)
    for row, a, i in zip(record["coders"]["h.2"], acts, indices, strict=True):
        expected = [(index, act) for index, act in zip(i.tolist(), a.tolist(), strict=True) if act > 0][:3]
        assert [firing["latent"] for firing in row] == [index for index, _ in expected]
        assert [firing["activation"] for firing in row] == pytest.approx([act for _, act in expected], rel=1e-4)


def test_tables(saved, capsys):
    arguments = ("--text", "a = [1]", "--hookpoints", "h.*.mlp", "--top", "2")
    code, out, _ = run(capsys, "encode", str(saved), "demo", *arguments)
    assert code == 0
    assert run(capsys, "encode", str(saved), *arguments)[:2] == (0, out)  # the coders' own notes name the model
    assert "h.3.mlp" in out
    assert "h.2" not in out
    assert any(line.split()[0] == "[" for line in out.splitlines())  # not taken for markup
    assert max(map(len, out.splitlines())) <= 80


def test_white_space_is_visible():
    assert [visible(text) for text in ("\n", "  ", "a\tb", " x")] == ["⏎", "··", "a⇥b", " x"]


def test_seeds_and_wrong_widths():
    model = make_model("gpt2")
    coders = {"h.1/seed0": make_coder(32, seed=0), "h.1/seed1": make_coder(32, seed=1)}
    rows = strongest_latents(coders, model, torch.tensor([5, 6, 7]))
    assert {name: len(row) for name, row in rows.items()} == {"h.1/seed0": 3, "h.1/seed1": 3}
    assert rows["h.1/seed0"] != rows["h.1/seed1"]
    with pytest.raises(CheckpointError, match="expected a coder of width 128 for this model, got one of width 32"):
        strongest_latents({"h.1.mlp.act": make_coder(32)}, model, torch.tensor([5, 6]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "demo"], 'error: text: expected some text: --text "..."'),
        (["RUN", "demo", "--text", "x", "--top", "0"], "error: top: expected at least 1, got 0"),
        (["RUN", "GPT2", "--text", "x"], "got one trained on demo"),
        (["RUN", "demo", "--text", "x " * 2000], "error: text: expected at most"),
    ],
)
def test_mistakes(saved, tmp_path, capsys, arguments, message):
    names = {"RUN": str(saved), "GPT2": str(tmp_path / "gpt2")}
    if "GPT2" in arguments:
        save_model("gpt2", tmp_path / "gpt2")
    code, _, err = run(capsys, "encode", *(names.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in one_line(err)
