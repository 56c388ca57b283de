"""``fastsae train --activations``: the coders of training on the fly, to the byte; shuffled, resumed, shared out."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from models import save_model, token_rows
from safetensors.torch import load_file
from test_cli import one_line, run
from test_resume import after_step, files

from fastsae import CachedActivations, SaeConfig, TrainConfig, Trainer, training_data
from fastsae.cli import main
from fastsae.errors import CheckpointError, ConfigError, HookpointError
from fastsae.interrupt import Interrupted
from fastsae.rows import Batches, split_held_out

ROWS, LENGTH = 66, 8
HOOKPOINTS = ["--hookpoints", "h.0", "h.1.mlp"]
TRAIN = ["--num-latents", "64", "--k", "4", "--batch-size", "4", "--lr", "0.01", "--log-every", "2", "--device", "cpu"]
WAYS = {
    "plain": [],
    "parts": ["--grad-acc-steps", "2", "--micro-acc-steps", "3", "--init-seeds", "0", "1", "--save-best"],
    "transcoder": ["--transcode", "--skip-connection", "--optimizer", "signum", "--hookpoints", "h.1.mlp"],
    "several": ["--set", "h.0:k=2|8", "--optimizer", "adam8bit", "--auxk-alpha", "1", "--dead-feature-threshold", "99"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, data, and its cache ``acts``, without the tokens named eos, and 5."""
    folder = tmp_path_factory.mktemp("cached")
    model = save_model("gpt2", folder / "model")
    token_rows(ROWS, LENGTH).to_parquet(folder / "data.parquet")
    command = [
        "cache",
        str(model),
        str(folder / "data.parquet"),
        *HOOKPOINTS,
        "--inputs",
        "--storage",
        "float32",
        "--yes",
    ]
    command += ["--batch-size", "4", "--exclude-tokens", "eos,5", "--device", "cpu", "--storage", "float32"]
    with suppress(SystemExit):
        main([*command, "--output", str(folder / "acts")])
    return folder


def cfg_for(folder: Path, **changes) -> TrainConfig:
    values = {
        "sae": SaeConfig(num_latents=64, k=4), "batch_size": 4, "lr": 0.01, "save_every": 3, "log_every": 2,
        "activations": str(folder / "acts"), "save_dir": str(folder), "run_name": "run", **changes,
    }  # fmt: skip
    return TrainConfig(**values)


def trainer_for(cfg: TrainConfig) -> Trainer:
    return Trainer(cfg, *training_data(CachedActivations(cfg.activations), cfg, device="cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_the_coders_are_those_of_training_on_the_fly(folder, tmp_path, capsys, monkeypatch, way):
    options = [*TRAIN, *([] if way == "transcoder" else HOOKPOINTS), *WAYS[way], "--run-name", "run", "--save-dir"]
    data = [str(folder / "model"), str(folder / "data.parquet"), "--exclude-tokens", "5", "eos"]
    code, said, err = run(capsys, "train", *data, *options, str(tmp_path / "fly"))
    assert code == 0, err

    def loads(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastsae.run.load_model", loads)
    code, out, err = run(capsys, "train", "--activations", str(folder / "acts"), *options, str(tmp_path / "disk"))
    assert code == 0, err
    fly, disk = files(tmp_path / "fly/run"), files(tmp_path / "disk/run")
    assert len(fly) >= 3
    assert disk == fly  # coders, their notes, losses, best checkpoints by held-out FVU

    def table(text: str) -> list[list[str]]:
        return [line.split()[:8] for line in text.splitlines() if "│ h.1.mlp" in line]

    assert table(out) == table(said) != []  # held-out FVU, L0, dead latents, tokens
    ours, theirs = (json.loads((tmp_path / way_in / "run/config.json").read_text()) for way_in in ("disk", "fly"))
    assert {key for key in ours if ours[key] != theirs[key]} - {"hookpoints"} == {"activations", "save_dir"}


def test_shuffled_tokens_come_as_the_reader_gives_them_and_held_out_ones_do_not(folder, tmp_path):
    cfg = cfg_for(folder, shuffle_tokens=3, save_dir=str(tmp_path))
    cache = CachedActivations(str(cfg.activations))
    rows, source = training_data(cache, cfg, device="cpu")
    rows, held_out = split_held_out(rows, 64)
    assert (len(held_out), held_out.sequences) == (3, 3)
    got: list[torch.Tensor] = []
    for batch in Batches(rows, 4):
        assert source.count(batch) == source.run(
            batch, lambda name, x, y: got.append(y) if name == "h.0" else None, at=""
        )
    want = [pair["h.0"][1] for pair in cache.shuffled(4 * LENGTH, seed=3, stop=ROWS - 3)]
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))
    in_order = next(iter(cache.batches(ROWS - 3)))["h.0"][1]
    assert torch.equal(torch.cat(got).sort(0).values, in_order.sort(0).values)
    assert not torch.equal(torch.cat(got), in_order)
    trainer = trainer_for(cfg)
    trainer.fit(progress=False)
    assert trainer.tokens == len(in_order)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(folder, tmp_path, capsys, seed):
    whole = cfg_for(folder, save_dir=str(tmp_path / "whole"), shuffle_tokens=seed)
    trainer_for(whole).fit(progress=False)
    cfg = cfg_for(folder, save_dir=str(tmp_path), shuffle_tokens=seed, exclude_tokens=(0, 5))
    cache = CachedActivations(str(cfg.activations))
    origin = {"model": cache.index.model, "dataset": cache.index.dataset, **cache.index.data}
    trainer = Trainer(cfg, *training_data(cache, cfg, device="cpu"), origin=origin)
    after_step(trainer, 7, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.fit(progress=False)
    code, _, err = run(capsys, "train", "--resume", str(tmp_path / "run"), "--device", "cpu")
    assert code == 0, err
    names = ["h.0/sae.safetensors", "h.1.mlp/sae.safetensors", "metrics.jsonl"]
    done, want = files(tmp_path / "run"), files(tmp_path / "whole/run")
    assert all(done[name] == want[name] for name in names)


def test_another_cache_or_order_is_no_way_to_go_on(folder, tmp_path):
    trainer = trainer_for(cfg_for(folder, save_dir=str(tmp_path), shuffle_tokens=3))
    after_step(trainer, 7, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        trainer.fit(progress=False)
    with pytest.raises(ConfigError, match="expected shuffle_tokens = 3, as the run started with, got 4"):
        trainer_for(cfg_for(folder, save_dir=str(tmp_path), shuffle_tokens=4)).resume(tmp_path / "run")
    cfg = cfg_for(folder, save_dir=str(tmp_path), shuffle_tokens=3)
    cache = CachedActivations(str(cfg.activations))
    cache.index = dataclasses.replace(cache.index, shards=(dataclasses.replace(cache.index.shards[0], sha256="0"),))
    with pytest.raises(CheckpointError, match="expected the data that the run started with, with checksum"):
        Trainer(cfg, *training_data(cache, cfg, device="cpu")).resume(tmp_path / "run")


def test_a_streams_first_sequences_are_held_out_as_on_the_fly(folder):
    cache = CachedActivations(folder / "acts")
    cache.index = dataclasses.replace(cache.index, data={**cache.index.data, "streaming": True})
    rows, held_out = split_held_out(training_data(cache, cfg_for(folder), device="cpu")[0], 2)
    first = cache.tokens_of(0, 2)[1]
    assert held_out.collate(held_out.take(9))["tokens"].tolist() == list(range(first))
    assert rows.collate(rows.take(1))["tokens"][0] == first
    assert len(rows) == ROWS - 2


def test_owners_in_two_processes_train_the_same_bytes(folder, tmp_path):
    """Each process reads its part of a batch: the joined batch is the single process's."""
    cfg = cfg_for(folder, save_dir=str(tmp_path / "one"), shuffle_tokens=1)
    trainer_for(cfg).fit(progress=False)
    command = ["train", "--activations", str(folder / "acts"), "--run-name", "run", "--shuffle-tokens", "1", *TRAIN]
    command += ["--batch-size", "2", "--save-dir", str(tmp_path / "two"), "--distribute-modules"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastsae"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("h.0", "h.1.mlp"):
        one, two = (load_file(tmp_path / way / "run" / name / "sae.safetensors") for way in ("one", "two"))
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hookpoints", "h.2.mlp"], "no cached activations matches hookpoint 'h.2.mlp'; close matches: h.1.mlp"),
        (["--layers", "2"], "expected the residual stream of layer 2 in the cache, it holds h.0, h.1.mlp"),
        (["--ctx-len", "16"], "the cache holds ctx_len = 2048, got 16"),
        (["gpt2"], "the cache holds model ="),
        (["--exclude-tokens", "7"], "expected those that the cache was written without (0, 5), got 7"),
        (["--k", "99"], "expected k <= number of latents"),
        (["--finetune", "coders"], "finetune: h.0: expected a saved coder with d_in = 32, got 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_cache_is_refused(folder, tmp_path, capsys, options, message):
    from fastsae import FastSae

    coder = FastSae(16, SaeConfig(num_latents=64, k=4))
    coder.save_to_disk(tmp_path / "coders/h.0")
    coder.save_to_disk(tmp_path / "coders/h.1.mlp")
    options = [str(tmp_path / word) if word == "coders" else word for word in options]
    code, _, err = run(
        capsys,
        "train",
        *options,
        "--activations",
        str(folder / "acts"),
        *TRAIN[:2],
        "--save-dir",
        str(tmp_path / "out"),
    )
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()


def test_damaged_unfinished_and_input_less_caches_are_refused(folder, tmp_path, capsys):
    code, _, err = run(capsys, "train", "--activations", str(tmp_path))
    assert code == 2
    assert "expected a folder written by fastsae cache" in one_line(err)
    cache = CachedActivations(folder / "acts")
    cache.index = dataclasses.replace(cache.index, inputs={})
    cfg = cfg_for(folder, sae=SaeConfig(num_latents=64, k=4, transcode=True))
    with pytest.raises(HookpointError, match="h.0: expected its inputs for a transcoder; cache them with --inputs"):
        training_data(cache, cfg, device="cpu")
    code, _, err = run(capsys, "train", "--shuffle-tokens", "1")
    assert code == 2
    assert "shuffle_tokens: expected --activations FOLDER with it" in one_line(err)
