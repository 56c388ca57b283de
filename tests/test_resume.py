"""Going on with a run: whatever stopped it and wherever, its files are those of a run that nothing stopped."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import make_model, token_rows

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, state_files
from fastsae.errors import ArtifactError, CheckpointError, ConfigError
from fastsae.interrupt import Interrupted
from fastsae.memmap import MemmapTokens
from fastsae.rows import MapRows, RowSource
from fastsae.stream import TokenStream
from fastsae.tracking import Tracker

STEPS = 10


def make_trainer(folder: Path, dataset=None, **options) -> Trainer:
    values = {
        "sae": SaeConfig(num_latents=64, k=4), "batch_size": 4, "hookpoints": ("h.0", "h.1.mlp"), "log_every": 2,
        "save_every": 4, "lr": 0.01, "auxk_alpha": 1 / 32, "dead_feature_threshold": 100, "save_dir": str(folder),
        "run_name": "run", **options,
    }  # fmt: skip
    return Trainer(TrainConfig(**values), token_rows(42, 8) if dataset is None else dataset, make_model("gpt2"))


def files(run: Path) -> dict[str, bytes]:
    """What a run leaves, by name; of the metrics all but the speed, and not config.json, which names the folder."""
    found = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in ("metrics.jsonl", "config.json")
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["tokens_per_second"]
    return {**found, "metrics.jsonl": json.dumps(records).encode()}


def after_step(trainer: Trainer, step: int, action) -> None:
    """Let ``action`` run when ``step`` is done, before anything is saved."""
    train_step = trainer.train_step

    def then(batches, *counts):
        train_step(batches, *counts)
        if trainer.step == step:
            action()

    trainer.train_step = then  # type: ignore[method-assign]


def stopped(trainer: Trainer, step: int, signum: int = signal.SIGINT) -> Path:
    after_step(trainer, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted, match=f"saved after step {step} of {STEPS}; go on with: fastsae train --resume"):
        trainer.fit(progress=False)
    assert trainer.folder is not None
    return trainer.folder


def resumed(trainer: Trainer, run: Path) -> Path:
    trainer.resume(run)
    assert trainer.fit(progress=False).folder == run
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Files of a whole run, by the trainer's options."""
    known: dict[str, dict[str, bytes]] = {}

    def run(dataset=None, **options) -> dict[str, bytes]:
        key = repr((type(dataset), sorted(options.items())))
        if key not in known:
            trainer = make_trainer(tmp_path_factory.mktemp("whole"), dataset, **options)
            known[key] = files(trainer.fit(progress=False).folder)
        return known[key]

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adam8bit"},
        {"optimizer": "signum"},
        {"optimizer": "muon"},
        {"grad_acc_steps": 2, "batch_size": 2, "max_grad_norm": 0.1},
        {"micro_acc_steps": 2, "k_decay_steps": 7, "init_seeds": (0, 1)},
        {"sae": SaeConfig(activation="batchtopk", num_latents=64, k=4, matryoshka_widths=(16,))},
        {"token_buffer": 70},
    ],
    ids=["adam", "adam8bit", "signum", "muon", "accumulated", "chunked", "batchtopk", "token-buffer"],
)
@pytest.mark.parametrize("stops", [(1,), (4, 5), (9,)])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, options, stops):
    run = stopped(make_trainer(tmp_path, **options), stops[0])
    for step in stops[1:]:
        trainer = make_trainer(tmp_path, **options)
        trainer.resume(run)
        stopped(trainer, step, signal.SIGTERM)
    assert files(resumed(make_trainer(tmp_path, **options), run)) == uninterrupted(**options)


def test_coders_are_saved_averaged_and_trained_on_as_they_were(tmp_path):
    run = stopped(make_trainer(tmp_path, optimizer="signum"), 6)
    trainer = make_trainer(tmp_path, optimizer="signum")
    trainer.resume(run)
    saved = FastSae.load_from_disk(run / "h.0").encoder.weight
    assert not torch.equal(trainer.coders["h.0"].encoder.weight, saved)
    with trainer.evaluation_weights():
        assert torch.equal(trainer.coders["h.0"].encoder.weight, saved)


def stream() -> TokenStream:
    rows = [row["input_ids"].tolist() for row in MapRows(token_rows(60, 8)).take(60)]
    return TokenStream(Dataset.from_dict({"input_ids": rows}).to_iterable_dataset(num_shards=3), 42, buffer=7, seed=3)


def test_a_stream_goes_on_where_it_was_though_it_was_read_ahead(tmp_path, uninterrupted):
    whole = uninterrupted(stream())
    run = stopped(make_trainer(tmp_path, stream()), 3)
    assert files(resumed(make_trainer(tmp_path, stream()), run)) == whole


def test_a_memory_map_goes_on_where_it_was(tmp_path, uninterrupted):
    path = tmp_path / "tokens.bin"
    np.stack([row["input_ids"].numpy() for row in token_rows(42, 8)]).astype(np.uint16).tofile(path)

    def mapped() -> MemmapTokens:
        return MemmapTokens(path, 8, "uint16").shuffle(5)

    run = stopped(make_trainer(tmp_path, mapped()), 3)
    assert files(resumed(make_trainer(tmp_path, mapped()), run)) == uninterrupted(mapped())


def test_a_damaged_state_is_refused_by_name_and_the_one_before_is_used(tmp_path, uninterrupted, caplog):
    run = stopped(make_trainer(tmp_path), 9)
    assert sorted(path.name for path in (run / "state").glob("step-*")) == ["step-8", "step-9"]
    tensors = run / "state/step-9/tensors-0.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-100] ^= 1  # one bit
    tensors.write_bytes(content)
    trainer = make_trainer(tmp_path)
    trainer.resume(run)
    assert f"not used: {run / 'state/step-9'}: expected the files that were saved" in caplog.text
    assert trainer.step == 8
    trainer.fit(progress=False)
    assert files(run) == uninterrupted()


def test_large_states_are_written_in_parts(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(state_files, "SHARD_BYTES", 10_000)
    run = stopped(make_trainer(tmp_path), 5)
    sizes = [path.stat().st_size for path in (run / "state/step-5").glob("tensors-*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) < 12_000
    assert files(resumed(make_trainer(tmp_path), run)) == uninterrupted()


@pytest.mark.parametrize("name", ["tensors-0.safetensors", "state.json"])
def test_cut_off_states_are_refused(tmp_path, name):
    run = stopped(make_trainer(tmp_path), 2)
    path = run / "state/step-2" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="got damaged ones only"):
        make_trainer(tmp_path).resume(run)


@pytest.fixture
def largest_file():
    """Sets the size in bytes from which on files cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_costs_no_run(tmp_path, uninterrupted, largest_file):
    trainer = make_trainer(tmp_path)
    after_step(trainer, 8, lambda: largest_file(20_000))
    with pytest.raises(ArtifactError, match=r"could not write .*step-8: .*fastsae train --resume"):
        trainer.fit(progress=False)
    largest_file(resource.RLIM_INFINITY)
    run = tmp_path / "run"
    assert [path.name for path in (run / "state").glob("step-*")] == ["step-4"]
    assert FastSae.load_from_disk(run / "h.0").notes["step"] == 4
    assert files(resumed(make_trainer(tmp_path), run)) == uninterrupted()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_records_that_cannot_be_written_end_the_run_in_one_line(tmp_path, uninterrupted, monkeypatch):
    class FullTracker(Tracker):
        def __init__(self, *args):
            super().__init__(*args)
            self._file.close()
            self._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115

    with monkeypatch.context() as patch:
        patch.setattr("fastsae.trainer.Tracker", FullTracker)
        trainer = make_trainer(tmp_path, log_every=5)
        with pytest.raises(ArtifactError, match=r"could not write .*metrics.jsonl: No space left on device; free some"):
            trainer.fit(progress=False)
    trainer = make_trainer(tmp_path, log_every=5)
    trainer.resume(tmp_path / "run")
    assert trainer.step == 4
    trainer.fit(progress=False)
    assert files(tmp_path / "run") == uninterrupted(log_every=5)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, uninterrupted):
    run = stopped(make_trainer(tmp_path), 3)
    saved = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hold = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=1); input()"
    )
    command = [sys.executable, "-c", hold, str(run / "state/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=r"another process trains .*run right now; wait for it, or stop it"):
            make_trainer(tmp_path).resume(run)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == saved
        process.kill()
    trainer = make_trainer(tmp_path)

    def resume_too():  # it is ours meanwhile
        with pytest.raises(ArtifactError, match="another process"):
            make_trainer(tmp_path).resume(run)

    after_step(trainer, 4, resume_too)
    assert files(resumed(trainer, run)) == uninterrupted()


def test_a_finished_run_cannot_be_resumed(tmp_path):
    run = make_trainer(tmp_path).fit(progress=False).folder
    assert not (run / "state").exists()
    with pytest.raises(CheckpointError, match="found none: the run is finished"):
        make_trainer(tmp_path).resume(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.02}, "expected lr = 0.01, as the run started with, got 0.02"),
        ({"sae": SaeConfig(num_latents=64, k=5)}, "expected k = 4, as the run started with, got 5"),
        ({"optimizer": "signum"}, "expected optimizer = 'adam', as the run started with, got 'signum'"),
    ],
)
def test_another_config_is_refused(tmp_path, options, message):
    run = stopped(make_trainer(tmp_path), 1)
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **options).resume(run)


def test_other_data_are_refused(tmp_path):
    run = stopped(make_trainer(tmp_path), 1)
    with pytest.raises(CheckpointError, match="expected the data that the run started with"):
        make_trainer(tmp_path, token_rows(42, 8, seed=1)).resume(run)


def test_the_cursor_is_that_of_the_batches_trained_on(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = trainer._batches.rows
    assert isinstance(rows, RowSource)
    seen = []
    after_step(trainer, 3, lambda: seen.append(rows.state_dict()["next"]))
    stopped(trainer, 3)
    assert trainer.state_dict()["data"]["next"] == 3 * 4
    assert seen[0] >= 3 * 4  # the thread is ahead


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped(make_trainer(tmp_path / "a"), 2)
    make_trainer(tmp_path / "b").fit(progress=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
