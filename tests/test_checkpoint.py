"""Saved coders: the round trip, what is skipped, and what is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import FastSae, SaeConfig, TranscoderConfig
from fastsae.checkpoint import find_coders
from fastsae.errors import CheckpointError


@pytest.fixture
def coder() -> FastSae:
    torch.manual_seed(0)
    return FastSae(6, SaeConfig(num_latents=20, k=3, skip_connection=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_the_dtype(tmp_path, coder, dtype):
    coder.to(dtype).save_to_disk(tmp_path)
    loaded = FastSae.load_from_disk(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.cfg == coder.cfg
    for name, tensor in coder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert FastSae.load_from_disk(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_mixed_dtypes_stay_mixed(tmp_path, coder):
    coder.save_to_disk(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_dec"] = tensors["W_dec"].bfloat16()
    save_file(tensors, tmp_path / "sae.safetensors")
    loaded = FastSae.load_from_disk(tmp_path)
    assert loaded.W_dec is not None
    assert (loaded.W_dec.dtype, loaded.encoder.weight.dtype) == (torch.bfloat16, torch.float32)


def test_derived_latents_and_unknown_keys(tmp_path):
    FastSae(6, TranscoderConfig(expansion_factor=3, k=2)).save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["num_latents"], config["d_in"]) == (0, 6)
    config.pop("multi_topk")
    config["from_the_future"] = True
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    loaded = FastSae.load_from_disk(tmp_path)
    assert (loaded.num_latents, loaded.cfg.transcode, loaded.cfg.multi_topk) == (18, True, False)


def test_decoder_left_out(tmp_path, coder):
    coder.save_to_disk(tmp_path)
    assert FastSae.load_from_disk(tmp_path, decoder=False).W_dec is None
    tensors = load_file(tmp_path / "sae.safetensors")
    del tensors["W_dec"]
    save_file(tensors, tmp_path / "sae.safetensors")
    assert FastSae.load_from_disk(tmp_path, decoder=False).num_latents == 20
    with pytest.raises(CheckpointError, match="pass decoder=False"):
        FastSae.load_from_disk(tmp_path)


def test_load_many(tmp_path, coder):
    for name in ("h.10", "h.2", "h.2.mlp.act", "h.3/seed1", "h.3/seed0", "best/h.2"):
        coder.save_to_disk(tmp_path / name)
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert list(FastSae.load_many(tmp_path, local=True)) == ["h.2", "h.2.mlp.act", "h.3/seed0", "h.3/seed1", "h.10"]
    assert list(find_coders(tmp_path, pattern="h.3")) == ["h.3/seed0", "h.3/seed1"]
    assert list(FastSae.load_many(tmp_path, local=True, pattern="h.*.mlp.act")) == ["h.2.mlp.act"]
    assert list(FastSae.load_many(tmp_path, local=True, layers=["h.10", "h.2"])) == ["h.2", "h.10"]
    with pytest.raises(CheckpointError, match="no coder 'h.2.mpl.act'.*did you mean: h.2.mlp.act"):
        FastSae.load_many(tmp_path, local=True, layers=["h.2.mpl.act"])
    with pytest.raises(CheckpointError, match="matching 'layers.*found none"):
        FastSae.load_many(tmp_path, local=True, pattern="layers.*")


def test_from_the_hub(tmp_path, coder, monkeypatch):
    """The hub's snapshot is a folder; only the download is replaced."""
    for name in ("layers.3", "layers.10"):
        coder.save_to_disk(tmp_path / name)
    monkeypatch.setattr("fastsae.checkpoint.snapshot_download", lambda repo, allow_patterns=None: str(tmp_path))
    assert torch.equal(FastSae.load_from_hub("org/repo", "layers.3").b_dec, coder.b_dec)
    assert list(FastSae.load_many("org/repo")) == ["layers.3", "layers.10"]
    with pytest.raises(CheckpointError, match="no coder 'layers.30'.*did you mean: layers.3"):
        FastSae.load_from_hub("org/repo", "layers.30")
    with pytest.raises(CheckpointError, match="name the hookpoint"):
        FastSae.load_from_hub("org/repo")


def test_an_unreachable_hub_is_one_line():
    with pytest.raises(
        CheckpointError, match=r"expected a Hugging Face hub repository, got 'org/none'.*load_from_disk"
    ):
        FastSae.load_from_hub("org/none", "layers.3")


def _break_config(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    config.update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cfg.json").unlink(), "expected a coder's folder with cfg.json"),
        (lambda f: (f / "sae.safetensors").unlink(), "expected sae.safetensors beside cfg.json"),
        (lambda f: (f / "cfg.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "cfg.json").write_text("[]"), "expected a JSON object, got list"),
        (lambda f: (f / "sae.safetensors").write_bytes(b"123456789"), "not a readable safetensors file"),
        (lambda f: _break_config(f, signed=True), "signed activations"),
        (lambda f: _break_config(f, d_in="six"), "expected d_in, the input width, got 'six'"),
        (lambda f: _break_config(f, num_latents=21), r"expected encoder.weight \[21, 6\] .* got \[20, 6\]"),
        (lambda f: _break_config(f, skip_connection=False), "unexpected tensors"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, coder, damage, message):
    coder.save_to_disk(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        FastSae.load_from_disk(tmp_path)
