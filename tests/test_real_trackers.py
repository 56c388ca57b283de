"""W&B (offline) and TensorBoard as released, in real processes: the numbers of metrics.jsonl, never the token."""

import importlib.util
import json
import os
import struct
import subprocess
import sys

import pytest
from models import save_model, token_rows

TOKEN = "hf_verysecret"


def train(folder, *options: str) -> list[dict[str, float]]:
    """The records of metrics.jsonl of a run of ten steps."""
    save_model("gpt2", folder / "model")
    token_rows(42, 8).to_parquet(folder / "data.parquet")
    subprocess.run(
        [
            sys.executable, "-m", "fastsae", "train", "model", "data.parquet", "--hookpoints", "h.1",
            "--num-latents", "64", "--k", "4", "--batch-size", "4", "--log-every", "2", "--save-dir", ".",
            "--run-name", "run", *options,
        ],
        cwd=folder, check=True, capture_output=True, timeout=240,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline", "WANDB_DIR": str(folder),
        },
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_tensorboard_reads_the_numbers_of_the_jsonl(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = train(tmp_path, "--log-to", "tensorboard")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {*events.Tags()["scalars"], "step"} == set(records[0])
    for name in events.Tags()["scalars"]:  # in float32, as its files hold them
        wanted = [(r["step"], struct.unpack("f", struct.pack("f", r[name]))[0]) for r in records]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed; pip install wandb")
@pytest.mark.parametrize("given", [["--hf-token", TOKEN], [f"--hf-token={TOKEN}"]], ids=["word", "equals"])
def test_wandb_gets_the_last_numbers_and_never_the_access_token(tmp_path, given):
    records = train(tmp_path, "--log-to", "wandb", *given)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path.name for path in files if TOKEN.encode() in path.read_bytes()]
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"--num-latents" in content  # the command line is there, without the token
    for record in records:
        assert repr(record["fvu/h.1"]).encode() in content
