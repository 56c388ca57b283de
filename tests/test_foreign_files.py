"""Damaged, foreign and hostile files are refused in one line: no code runs, no path leaves its folder."""

import json
import os
import pickle

import pytest
import torch
from coders import D, L, make_coder
from safetensors.torch import load_file, save_file

from fastsae.compat import convert, files
from fastsae.errors import CheckpointError


class Payload:
    """A pickle that would run a command when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


WEIGHTS = {
    "sparsify": "sae.safetensors", "saelens": "sae_weights.safetensors", "dictionary_learning": "ae.pt",
    "openai": "autoencoder.pt", "circuit_tracer": "layer_0.safetensors",
}  # fmt: skip
CONFIGS = {
    "sparsify": "cfg.json",
    "saelens": "cfg.json",
    "dictionary_learning": "config.json",
    "circuit_tracer": "config.yaml",
}


def written(folder, to, **facts):
    facts |= {"transcode": True, "hookpoint": "h.0.mlp"} if to == "circuit_tracer" else {}
    facts |= {"layer_norm": True} if to == "openai" else {}
    convert.save({"": make_coder(**facts)}, folder, to)
    return folder


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        convert.load(path)
    assert "\n" not in str(caught.value)


def edit(path, change):
    """Rewrite a weights file with ``change`` done to its dict."""
    torch_file = path.suffix == ".pt"
    tensors = torch.load(path, weights_only=True) if torch_file else load_file(path)
    change(tensors)
    torch.save(tensors, path) if torch_file else save_file(tensors, path)


@pytest.mark.parametrize("to", ["dictionary_learning", "openai"])
def test_a_pickle_with_code_is_not_opened(tmp_path, to):
    folder, marker = written(tmp_path / "coder", to), tmp_path / "was-here"
    for dump in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        dump({"encoder.weight": Payload(marker)}, folder / WEIGHTS[to])
        refused(folder, "not a readable torch file.*other code")
        assert not marker.exists()
    with (folder / WEIGHTS[to]).open("rb") as file:  # the payload is live: torch's unsafe way would have run it
        pickle.load(file)
    assert marker.exists()


@pytest.mark.parametrize("to", WEIGHTS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "directory"])
def test_damaged_weights(tmp_path, to, damage):
    folder = written(tmp_path / "coder", to)
    file = folder / WEIGHTS[to]
    content = file.read_bytes()
    file.unlink()
    if damage == "directory":
        file.mkdir()
        with pytest.raises(CheckpointError):
            convert.load(folder)
        return
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not a model\n" * 9}[damage])
    refused(folder, "not a readable")


@pytest.mark.parametrize("to", CONFIGS)
def test_damaged_configs(tmp_path, to):
    file = written(tmp_path / "coder", to) / CONFIGS[to]
    for content in ("{", "[1, 2]", '"text"', "\x00\x01", "[" * 100_000):
        file.write_text(content)
        refused(file.parent, "not readable|expected a JSON object|expected a YAML mapping|unexpected value")


def test_yaml_makes_no_objects(tmp_path):
    file = written(tmp_path / "coder", "circuit_tracer") / "config.yaml"
    file.write_text(f"model_name: !!python/object/apply:os.system ['touch {tmp_path}/was-here']")
    refused(file.parent, "not readable as YAML")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("to", WEIGHTS)
def test_wrong_shapes_and_numbers(tmp_path, to):
    folder = written(tmp_path / "coder", to)
    file = folder / WEIGHTS[to]
    if to == "sparsify":  # as from other trainers, without the hash that would give every change away
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if k != "fastsae"}))
    whole = file.read_bytes()
    bias = {"sparsify": "encoder.bias", "dictionary_learning": "encoder.bias", "openai": "latent_bias"}.get(to, "b_enc")
    encoder = {"saelens": "W_enc", "circuit_tracer": "W_enc"}.get(to, "encoder.weight")
    for name, tensor in [
        (bias, torch.zeros(L + 1)), (bias, torch.zeros(())), (encoder, torch.zeros(3)),
        (encoder, torch.zeros(L + 1, D)), (bias, torch.zeros(L, dtype=torch.long)), (bias, torch.full((L,), torch.nan)),
    ]:  # fmt: skip
        file.write_bytes(whole)
        edit(file, lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor}))
        refused(folder, "expected (shape|a matrix|floats|finite|encoder|floating-point|k from)|the weights say|widths")
    file.write_bytes(whole)
    edit(file, lambda tensors: tensors.pop(bias))
    refused(folder, f"expected (a tensor )?{bias}")


def test_facts_of_the_wrong_type(tmp_path):
    folder = written(tmp_path / "coder", "saelens")
    cfg = json.loads((folder / "cfg.json").read_text())
    for change, match in [
        ({"k": 0}, "expected k from 1"), ({"k": "many"}, "expected k from 1"), ({"k": L + 1}, "expected k from 1"),
        ({"d_sae": 7}, "says d_sae = 7"), ({"architecture": "gated"}, "expected an architecture among"),
        ({"architecture": ["topk"]}, "unexpected value"),
        ({"normalize_activations": "expected_average_only_in"}, "property of the data"),
        ({"metadata": {"sae_lens_version": "6.0.0", "hf_hook_name": 7}}, "hookpoint: expected text, got 7"),
    ]:  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps({**cfg, **change}))
        refused(folder, match)
    edit(folder / WEIGHTS["saelens"], lambda tensors: tensors.update(scaling_factor=torch.ones(L)))
    (folder / "cfg.json").write_text(json.dumps(cfg))
    refused(folder, r"unexpected tensors \['scaling_factor'\]")


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/cron.d/job", "a/../../b", "..", ".hidden", "a//b", "a b", "a\x00b"]
)
def test_names_that_could_leave_their_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match="expected a name made of letters"):
        files.safe_name(name)
    coders = {name: make_coder(), "h.1": make_coder()}
    with pytest.raises(CheckpointError, match="expected a name made of letters"):
        convert.save(coders, tmp_path / "out", "sparsify")
    assert list(tmp_path.iterdir()) == []


def test_a_hookpoint_that_climbs_out_is_not_followed(tmp_path):
    for i in range(2):
        written(tmp_path / f"run/trainer_{i}", "dictionary_learning", hookpoint=f"../../escape{i}")
    with pytest.raises(CheckpointError, match="could leave its folder"):
        convert.convert(tmp_path / "run", tmp_path / "a/b/out", "sparsify")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    with pytest.raises(CheckpointError, match="could leave its folder"):
        convert.load("org/repo", "../../etc")
