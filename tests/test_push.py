"""``fastsae push``: what would go, the model card, and what is sent."""

import json

import pytest
import torch
import yaml
from coders import make_coder
from safetensors.torch import save_file
from test_cli import one_line, run

from fastsae import push
from fastsae.compat import convert
from fastsae.errors import CheckpointError

NOTES = {"version": "0.1", "tokens": 5000}


@pytest.fixture
def folder(tmp_path):
    """A run with two coders, an evaluation, and things that nobody should publish."""
    run_folder = tmp_path / "run"
    coders = {
        f"h.{i}.mlp": make_coder(hookpoint=f"h.{i}.mlp", model="openai-community/gpt2", notes=NOTES) for i in range(2)
    }
    convert.save(coders, run_folder, "sparsify")
    (run_folder / "config.json").write_text(json.dumps({"model": "openai-community/gpt2", "dataset": "/home/me/texts"}))
    estimate = {"value": 0.1234567, "low": 0.12, "high": 0.13}
    alone = {"fvu": estimate, "l0": {"value": 4.0, "low": None, "high": None}, "density": {"dead": 3, "latents": 48}}
    evaluation = {
        "tokens": 12345, "dataset": "stdlib, held-out", "coders": [
            {"name": "h.0.mlp", "reconstruction": alone, "cross_entropy": {"recovered": estimate}},
            {"name": "h.1.mlp", "reconstruction": alone, "cross_entropy": None},
        ],
    }  # fmt: skip
    (run_folder / "eval.json").write_text(json.dumps(evaluation))
    for name in ("metrics.jsonl", "notes.txt", ".secret", "state/optimizer.safetensors", "best/h.0.mlp/cfg.json"):
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text("private")
    return run_folder


FILES = ["README.md", "config.json", "eval.json"] + [
    f"h.{i}.mlp/{name}" for i in range(2) for name in ("cfg.json", "sae.safetensors")
]


def test_a_dry_run_shows_the_files_and_the_card_and_sends_nothing(capsys, folder, monkeypatch):
    monkeypatch.setattr(push, "upload", lambda *_, **__: pytest.fail("something was sent"))
    code, out, err = run(capsys, "push", str(folder), "org/saes")
    assert (code, err) == (0, "")
    listed = [line.split("bytes")[1].strip() for line in out.splitlines() if " bytes  " in line]
    assert listed == FILES
    assert f"{(folder / 'eval.json').stat().st_size:,} bytes  eval.json" in out
    assert out.rstrip().endswith("dry run: nothing was sent to org/saes; send it with --no-dry-run")
    assert "# saes" in out
    assert "private" not in out


def test_the_card(folder):
    card = push.text(push.planned_files(folder, "org/saes")["README.md"])
    _, header, body = card.split("---", 2)
    values = yaml.safe_load(header)
    assert values["library_name"] == "fastsae"
    assert values["base_model"] == "openai-community/gpt2"
    assert "datasets" not in values  # a path of somebody's machine
    assert "/home/me" not in card
    assert "Sparse autoencoders trained on the activations of `openai-community/gpt2`" in body
    assert "| h.0.mlp | h.0.mlp | topk k=4 | 16 | 48 | fastsae 0.1, 5,000 tokens |" in body
    assert "12,345 tokens on stdlib, held-out" in body
    assert "| h.0.mlp | 0.1235 [0.1200, 0.1300] | 4.0 | 3 of 48 | 0.1235 [0.1200, 0.1300] |" in body
    assert "| h.1.mlp | 0.1235 [0.1200, 0.1300] | 4.0 | 3 of 48 | - |" in body
    assert 'sae = FastSae.load_from_hub("org/saes", "h.0.mlp")' in body


def test_a_card_says_nothing_about_what_was_not_measured(tmp_path):
    convert.save({"": make_coder("jumprelu", model="./my-model", transcode=True)}, tmp_path / "one", "saelens")
    planned = push.planned_files(tmp_path / "one", "org/one")
    assert list(planned) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    card = push.text(planned["README.md"])
    assert "Evaluation" not in card
    assert "my-model" not in card
    assert "Transcoders, in the format of saelens" in card
    assert 'coder = load("org/one")' in card


def test_a_readme_of_ones_own_is_kept(folder):
    (folder / "README.md").write_text("mine")
    assert push.text(push.planned_files(folder, "org/saes")["README.md"]) == "mine"


class Hub:
    """Takes a commit instead of the hub's client, and keeps what it was given."""

    def __init__(self, token=None):
        self.seen.append(("token", token))

    def create_repo(self, repo, **options):
        self.seen.append((repo, options))

    def create_commit(self, repo, operations, commit_message):
        self.seen.append({op.path_in_repo: op.upload_info.size for op in operations})

        class Commit:
            repo_url = f"https://hub/{repo}"

        return Commit


def test_what_is_sent(capsys, folder, monkeypatch):
    Hub.seen = []  # type: ignore[attr-defined]
    monkeypatch.setattr(push, "HfApi", Hub)
    code, out, _ = run(capsys, "push", str(folder), "org/saes", "--no-dry-run", "--private", "--hf-token", "hf_x")
    assert code == 0
    assert out.rstrip().endswith("sent to https://hub/org/saes")
    assert "hf_x" not in out
    token, made, sent = Hub.seen  # type: ignore[attr-defined]
    assert token == ("token", "hf_x")
    assert made == ("org/saes", {"private": True, "exist_ok": True})
    assert list(sent) == FILES
    assert sent["h.0.mlp/sae.safetensors"] == (folder / "h.0.mlp/sae.safetensors").stat().st_size


def test_the_hubs_refusal_is_one_line(capsys, folder):
    """By the hub's real client, which is offline in tests."""
    code, out, err = run(capsys, "push", str(folder), "org/saes", "--no-dry-run")
    assert code == 2
    assert one_line(err).startswith("error: push: expected to write to 'org/saes', got: ")
    assert "log in with hf auth login" in one_line(err)
    assert "Traceback" not in err
    assert "sent to" not in out


def test_users_mistakes(capsys, folder, tmp_path):
    for arguments, message in [
        ([str(folder), "not a repo!"], "expected a repository like org/name"),
        ([str(tmp_path / "none"), "org/saes"], "expected a folder with coders"),
        ([str(folder / "state"), "org/saes"], "expected coders of one of"),
    ]:
        code, _, err = run(capsys, "push", *arguments)
        assert code == 2
        assert message in one_line(err)


def test_a_damaged_coder_is_not_published(folder):
    save_file({"b_dec": torch.zeros(3)}, folder / "h.0.mlp/sae.safetensors")
    with pytest.raises(CheckpointError):
        push.planned_files(folder, "org/saes")
