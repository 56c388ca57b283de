"""One model in two processes, each with a part of every layer: what coders see and learn, beside an undivided model."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_model, token_rows
from ranks import launch_ranks
from safetensors.torch import load_file
from tensor_parallel_worker import (
    RUNS,
    SLICED,
    TRANSCODERS,
    WHOLE,
    activations,
    first_gradients,
    lose,
    main,
    make_trainer,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fastsae import FastSae, RunConfig, devices, load_language_model, load_model, plan
from fastsae.cli import main as command
from fastsae.coder_config import SaeConfig
from fastsae.config import TrainConfig
from fastsae.errors import ConfigError
from fastsae.run import train_run

RANKS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        save_model(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    launch_ranks(RANKS, main, folder, str(saved / "llama"), str(saved / "gpt2"))
    return folder


@pytest.fixture(scope="module")
def undivided(saved):
    return load_model(str(saved / "llama"), RunConfig())


def coders(run: Path) -> dict[str, dict]:
    return {str(file.parent.relative_to(run)): load_file(file) for file in sorted(run.rglob("sae.safetensors"))}


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "tokens_per_second")} for line in lines]


def assert_alike(got: Path, want: Path) -> None:
    """Runs that differ by rounding: a sum over two processes is made in another order."""
    for line, expected in zip(records(got), records(want), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ours, theirs = coders(got), coders(want)
    assert ours.keys() == theirs.keys()
    for coder, tensors in theirs.items():
        for key, tensor in tensors.items():
            assert ours[coder][key].shape == tensor.shape
            assert (ours[coder][key] - tensor).abs().mean() < 1e-5, (coder, key)


def test_every_process_sees_the_undivided_models_activations(folder, undivided):
    want = activations(undivided)
    assert set(want) == {*WHOLE, *SLICED}
    seen = [torch.load(folder / f"seen-{rank}.pt") for rank in range(RANKS)]
    for name, pair in want.items():
        for part, tensor in enumerate(pair):
            for rank in seen:
                torch.testing.assert_close(rank["activations"][name][part], tensor, rtol=1e-4, atol=1e-6)
            assert seen[0]["activations"][name][part].equal(seen[1]["activations"][name][part])
    total = sum(parameter.numel() for parameter in undivided.parameters())
    assert all(rank["size"] < total for rank in seen)


@pytest.mark.parametrize("name", RUNS)
def test_coders_are_what_one_process_trains(folder, undivided, tmp_path, name):
    make_trainer(undivided, tmp_path, name, **RUNS[name]).fit(progress=False)
    assert_alike(folder / name, tmp_path / name)
    FastSae.load_many(folder / name, local=True)


def test_transcoders_learn_from_whole_inputs(folder, undivided, tmp_path):
    """A rank has a slice of what comes into ``down_proj``, and all that it gives."""
    want = first_gradients(make_trainer(undivided, tmp_path, "transcoders", **TRANSCODERS))
    got = {key: tensor for rank in range(RANKS) for key, tensor in torch.load(folder / f"gradients-{rank}.pt").items()}
    assert got.keys() == want.keys()
    assert {tuple(tensor.shape) for tensor in want.values()} == {(67, 48), (67,), (67, 32), (32,)}
    assert all(tensor.any() for key, tensor in want.items() if key.endswith("W_dec"))
    scale = max(tensor.abs().max().item() for tensor in want.values())
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-4 * scale)  # b_dec's is rounding alone


def test_a_stopped_run_goes_on_to_the_same_bytes(folder):
    want, got = coders(folder / "owners"), coders(folder / "stopped")
    assert records(folder / "stopped") == records(folder / "owners")
    assert all(tensor.equal(got[coder][key]) for coder, tensors in want.items() for key, tensor in tensors.items())


def test_one_process_goes_on_with_what_two_had_saved(folder, undivided):
    trainer = make_trainer(undivided, folder, "copied", **RUNS["owners"])
    trainer.resume(folder / "copied")
    assert trainer.step == 2
    trainer.fit(progress=False)
    assert_alike(folder / "copied", folder / "owners")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no plan", "ConfigError: tp_plan: expected a model that transformers has a tensor-parallel plan for"),
        ("other rows", "ArtifactError: dataset: expected the same rows in every process"),
        ("half", "ConfigError: distribute_latents: expected 2 with --tp-plan"),
        ("kl", "ConfigError: loss_fn: expected fvu with --tp-plan, got kl"),
        ("partial", "HookpointError: layers.0: --tp-plan expects activations that are whole on every process"),
    ],
)
def test_what_cannot_be_is_refused_on_every_process(folder, case, message):
    for rank in range(RANKS):
        assert torch.load(folder / f"refusals-{rank}.pt")[case].startswith(message)


@pytest.mark.parametrize(
    ("at", "hookpoint"), [("layers.1", "layers.1"), ("layers.0.mlp.act_fn", "layers.0.mlp.act_fn")]
)
def test_a_part_of_the_model_that_is_gone_is_told_from_a_model_that_fails(saved, tmp_path, at, hookpoint):
    """In a sum that the model makes, and in the gathering of a slice."""
    with pytest.raises(ChildFailedError):  # seen so late that the other rank has spoken
        launch_ranks(RANKS, lose, tmp_path, str(saved / "llama"), at, hookpoint, monitor_interval=4)
    said = (tmp_path / f"{at}.txt").read_text()
    assert said.startswith("LostRankError: model: another rank, which holds a part of it, ended")


def test_one_process_has_nobody_to_share_the_model_with(saved, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["train", str(saved / "llama"), "stdlib", "--tp-plan", "auto", "--max-tokens", "1000"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error: tp_plan: expected the processes of one training run" in said
    assert "torchrun --nproc-per-node N" in said


def test_a_plan_needs_accelerate(saved, monkeypatch):
    monkeypatch.setattr(devices, "plan_options", lambda *_: {})  # as in several processes
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(ConfigError, match="tp_plan: expected the package 'accelerate'.*pip install accelerate"):
        load_model(str(saved), RunConfig(tp_plan="auto", device="cpu"))


@pytest.mark.parametrize("option", [{"device_map": "auto"}, {"load_in_8bit": True}])
def test_two_ways_to_divide_a_model_contradict_each_other(option):
    with pytest.raises(ConfigError, match=f"tp_plan: expected no --{next(iter(option)).replace('_', '-')} with it"):
        RunConfig(tp_plan="auto", **option)


def test_an_lm_head_and_a_plan_are_refused(saved):
    with pytest.raises(ConfigError, match="tp_plan: expected the model without its LM head"):
        load_language_model(str(saved / "llama"), RunConfig(tp_plan="auto"))
    with pytest.raises(ConfigError, match="tp_plan: expected a run whose processes each hold the model"):
        plan(TrainConfig(SaeConfig()), str(saved / "llama"), run=RunConfig(tp_plan="auto"))


def test_cached_activations_need_no_plan(saved, tmp_path):
    rows = str(tmp_path / "rows")
    token_rows(20, 8).save_to_disk(rows)
    cache = [
        "cache",
        str(saved / "llama"),
        rows,
        "--hookpoints",
        "layers.1",
        "--output",
        str(tmp_path / "acts"),
        "--yes",
    ]
    with pytest.raises(SystemExit, match="0"):
        command(cache)
    cached = {"activations": str(tmp_path / "acts"), "tp_plan": "auto", "save_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="tp_plan: expected .*cache"):
        train_run(cached)


def test_the_command_line_trains_in_parts(saved, tmp_path):
    """As a user starts it: a finished run, with a table, from two processes of torchrun."""
    token_rows(24, 8).save_to_disk(tmp_path / "rows")
    options = ["--hookpoints", "layers.*.mlp", "--batch-size", "4", "--num-latents", "64", "--k", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "fastsae",
         "train", str(saved / "llama"), str(tmp_path / "rows"), "--tp-plan", "auto", "--save-dir", str(tmp_path),
         "--run-name", "here", *options],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saved in" in done.stdout
    assert "rank 1: 0.0 M parameters (50%): layers.1.mlp" in " ".join(done.stderr.split())
    lines = records(tmp_path / "here")
    assert lines[-1]["tokens"] == 23 * 8
    assert math.isfinite(lines[-1]["fvu"])
    assert json.loads((tmp_path / "here" / "config.json").read_text())["tp_plan"] == "auto"
