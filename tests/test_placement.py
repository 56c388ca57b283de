"""Models spread by accelerate: parts on a disk, and hooks that see real tensors all the same."""

import importlib.util
import json

import pytest
import torch
from models import make_model, save_model, token_rows
from placement_worker import main as refused
from ranks import launch_ranks
from safetensors.torch import load_file

from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, load_model
from fastsae.cli import main
from fastsae.errors import ConfigError
from fastsae.hooks import run_hooked
from fastsae.placement import entry_device, parse_device_map

IN_PARTS = json.dumps({"wte": "disk", "wpe": "cpu", "h.0": "cpu", "h.1": "disk", "h.2": "cpu", "ln_f": "disk"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    return str(save_model("gpt2", tmp_path_factory.mktemp("model")))


def seen(model) -> dict[str, torch.Tensor]:
    outputs: dict[str, torch.Tensor] = {}
    ids = token_rows(2, 8)[:]["input_ids"].to(entry_device(model))
    run_hooked(
        model, ids, dict.fromkeys(("h.0", "h.1", "h.1.mlp.act"), 0), lambda name, _, y: outputs.update({name: y})
    )
    return outputs


@pytest.mark.parametrize("device_map", ["auto", IN_PARTS])
def test_hooks_see_what_an_undivided_model_gives(saved, device_map):
    pytest.importorskip("accelerate")
    device = None if device_map == "auto" else "cpu"
    spread, whole = load_model(saved, RunConfig(device_map=device_map)), load_model(saved, RunConfig(device=device))
    on_disk = any(parameter.is_meta for parameter in spread.parameters())
    assert on_disk == (device_map == IN_PARTS)
    assert entry_device(spread) == whole.device
    theirs = seen(spread)
    computed_alike = device is None or not torch.cuda.is_available()  # accelerate computes on a GPU where there is one
    tolerance = {"rtol": 0, "atol": 0} if computed_alike else {"rtol": 1e-3, "atol": 1e-3}
    for name, output in seen(whole).items():
        torch.testing.assert_close(theirs[name].to(output.device), output, **tolerance, msg=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate computes on the GPU what lies on a CPU or a disk")
def test_training_on_a_model_in_parts_gives_the_same_bytes(saved, tmp_path):
    pytest.importorskip("accelerate")
    weights = []
    for name, device_map in (("whole", None), ("parts", IN_PARTS)):
        cfg = TrainConfig(
            SaeConfig(num_latents=64, k=4),
            hookpoints=("h.1", "h.2"),
            batch_size=4,
            save_dir=str(tmp_path),
            run_name=name,
        )
        Trainer(cfg, token_rows(24, 8), load_model(saved, RunConfig(device_map=device_map))).fit(progress=False)
        weights.append([load_file(tmp_path / name / at / "sae.safetensors") for at in ("h.1", "h.2")])
    for whole, parts in zip(*weights, strict=True):
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("text", ["fast", "{", "[]", "{}", '{"h.0": 1.5}', '{"h.0": true}'])
def test_a_map_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="device_map: expected auto, balanced, .*, or a JSON object such as"):
        RunConfig(device_map=text)


def test_a_map_and_a_device_contradict_each_other(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--device-map", "auto", "--device", "cpu"])
    assert ended.value.code == 2
    assert "error: device_map: expected no --device with it" in " ".join(capsys.readouterr().err.split())


def test_several_processes_are_refused_by_each_of_them(saved, tmp_path):
    """The command before anything is loaded, a Trainer where it gets such a model."""
    pytest.importorskip("accelerate")
    launch_ranks(2, refused, tmp_path, saved, IN_PARTS)
    refusal = (
        "device_map: expected one process, which spreads its model over all devices, got 2; leave --device-map or "
        "torchrun out, or give --tp-plan auto in its place"
    )
    assert [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in range(2)] == [[refusal] * 2] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "device_map: expected a run whose model is on one device, got one that spreads it over several, which is "
             "not planned yet; leave --device-map out to plan for a single device"),
        (["--ranks", "2"], "device_map: expected one process, which spreads its model over all devices, got 2"),
    ],
)  # fmt: skip
def test_a_plan_says_that_it_knows_no_maps(capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "demo", "--device-map", "auto", *options])
    assert ended.value.code == 2
    assert f"error: {said}" in " ".join(capsys.readouterr().err.split())


def test_a_map_without_all_modules_says_so(saved):
    pytest.importorskip("accelerate")
    with pytest.raises(ConfigError, match="device_map: expected a device that is here for every module"):
        load_model(saved, RunConfig(device_map='{"h.0": "cpu", "h.1": "disk"}'))


def test_a_map_needs_accelerate(saved, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="device_map: expected the package 'accelerate'.*pip install accelerate"):
        load_model(saved, RunConfig(device_map="auto"))


def test_the_first_that_computes_takes_the_ids():
    model = make_model("gpt2")
    model.hf_device_map = {"wte": "cpu", "h.0": "disk", "h.1": 1, "h.2": 0}
    assert entry_device(model) == torch.device("cuda:1")
    assert parse_device_map('{"h": 0}') == {"h": 0}
