"""Saved coders: the round trip, what is skipped, and what is refused by name."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import FastSae, SaeConfig, TranscoderConfig
from fastsae.coder_folders import find_coders
from fastsae.errors import ArtifactError, CheckpointError


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
    _replace_weights(tmp_path, tensors)
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
    _replace_weights(tmp_path, tensors)
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
    monkeypatch.setattr("fastsae.coder_folders.snapshot_download", lambda repo, allow_patterns=None: str(tmp_path))
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


def _replace_weights(folder, tensors):
    """As another library writes them: no hash beside."""
    save_file(tensors, folder / "sae.safetensors")
    _break_config(folder, fastsae={})


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
        (lambda f: _break_config(f, k="many"), "cfg.json: k: expected an integer, got 'many'"),
        (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe{}"), "cfg.json: not readable as JSON"),
        (lambda f: os.truncate(f / "sae.safetensors", 700), "sae.safetensors: not a readable safetensors file"),
        (lambda f: torch.save({}, f / "sae.safetensors"), "sae.safetensors: not a readable safetensors file"),
        (lambda f: (f / "sae.safetensors").rename(f / "ae.pt"), "found ae.pt, which could run code and is not opened"),
        (lambda f: _flip_a_bit(f / "sae.safetensors"), "expected the file that was saved, with sha256 .*, got "),
        (lambda f: _break_config(f, fastsae=[1], num_latents=21), r"expected encoder.weight \[21, 6\]"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, coder, damage, message):
    coder.save_to_disk(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        FastSae.load_from_disk(tmp_path)


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite(tmp_path, coder, value, dtype):
    coder.save_to_disk(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["b_dec"][[1, 4]] = value
    _replace_weights(tmp_path, {**tensors, "b_dec": tensors["b_dec"].to(dtype)})
    with pytest.raises(CheckpointError, match="expected finite numbers, got 2 that are NaN or inf in b_dec"):
        FastSae.load_from_disk(tmp_path)


def test_the_hash_is_that_of_the_file(tmp_path, coder):
    coder.notes = {"step": 7}
    coder.save_to_disk(tmp_path)
    digest = hashlib.sha256((tmp_path / "sae.safetensors").read_bytes()).hexdigest()
    assert FastSae.load_from_disk(tmp_path).notes == {"step": 7, "sha256": digest}


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_between_the_renames_leaves_a_coder(tmp_path, coder, monkeypatch, crash_at):
    coder.save_to_disk(tmp_path)
    before = coder.b_dec.detach().clone()
    coder.b_dec.data += 1
    renames, replace = [], os.replace

    def crash(*paths):
        renames.append(paths)
        if len(renames) == crash_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("fastsae.checkpoint.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        coder.save_to_disk(tmp_path)
    monkeypatch.undo()
    expected = before if crash_at == 1 else before + 1
    assert torch.equal(FastSae.load_from_disk(tmp_path).b_dec, expected)
    coder.b_dec.data += 1  # and the next save works
    coder.save_to_disk(tmp_path)
    assert torch.equal(FastSae.load_from_disk(tmp_path).b_dec, before + 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]


def test_a_killed_process_leaves_a_coder(tmp_path):
    """SIGKILL while a real process saves again and again."""
    script = (
        "import sys; from fastsae import FastSae, SaeConfig; sae = FastSae(64, SaeConfig(num_latents=4096, k=3))\n"
        "for i in range(10**6):\n    sae.b_dec.data.fill_(i); sae.save_to_disk(sys.argv[1]); print(i, flush=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        saved = [int(process.stdout.readline()) for _ in range(3)]
        process.kill()
        last = max([*saved, *map(int, process.stdout.read().split())])
    assert FastSae.load_from_disk(tmp_path).b_dec.unique().item() in (last, last + 1)


def test_a_full_disk_keeps_what_was_saved(tmp_path, coder):
    resource = pytest.importorskip("resource", reason="POSIX only")
    coder.save_to_disk(tmp_path)
    before = coder.b_dec.detach().clone()
    coder.b_dec.data += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"could not write .*: .*; what was saved before is still there"):
            coder.save_to_disk(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(FastSae.load_from_disk(tmp_path).b_dec, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]


@pytest.mark.parametrize("name", ["../secret", "h.0/../../secret", "/etc", "", "..", "h.0\\..", "C:/x"])
def test_names_that_lead_out_of_the_folder(tmp_path, coder, monkeypatch, name):
    coder.save_to_disk(tmp_path / "secret")
    coder.save_to_disk(tmp_path / "run/h.0")
    monkeypatch.setattr("fastsae.coder_folders.snapshot_download", lambda *_, **__: str(tmp_path / "run"))
    for load in (
        lambda: FastSae.load_many(tmp_path / "run", local=True, layers=[name]),
        lambda: FastSae.load_many("org/repo", layers=[name]),
    ):
        with pytest.raises(CheckpointError, match="which leads out of its folder"):
            load()


def test_variants_and_seeds_are_found_and_other_folders_are_not(tmp_path, coder):
    for name in ("h.0/k32/seed1", "h.0/k8", "h.1", "best/h.1", "steps/10/h.1", "steps/10/h.1/seed0"):
        coder.save_to_disk(tmp_path / name)
    assert list(find_coders(tmp_path)) == ["h.0/k8", "h.0/k32/seed1", "h.1"]
    assert list(find_coders(tmp_path, pattern="h.0")) == ["h.0/k8", "h.0/k32/seed1"]
    assert list(find_coders(tmp_path / "steps/10")) == ["h.1", "h.1/seed0"]
