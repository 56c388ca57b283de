"""A rank that fails ends all of them, in seconds, and it is its error that shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from failing_worker import CASES, main
from models import VOCABULARY, save_model, token_rows
from ranks import launch_ranks
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

RANKS, LIMIT = 2, 60  # seconds for start and end, on a busy machine; a hang would take half an hour


def ended(command: list[str]) -> tuple[int, str]:
    """(exit code, stderr)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stderr


def test_a_mistake_in_one_ranks_data_is_a_line_of_that_rank(tmp_path):
    save_model("gpt2", tmp_path / "model")
    rows = [row["input_ids"].tolist() for row in token_rows(63, 8)]
    Dataset.from_dict({"input_ids": [*rows, [VOCABULARY] * 8]}).to_parquet(tmp_path / "data.parquet")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    options = ["--hookpoints", "h.1", "--num-latents", "64", "--k", "4", "--batch-size", "4"]
    data = [str(tmp_path / "model"), str(tmp_path / "data.parquet"), "--save-dir", str(tmp_path / "runs")]
    code, err = ended([*start, "-m", "fastsae", "train", *data, *options])
    assert code != 0
    lines = " ".join(err.split())
    assert re.search(rf"rank [01]: error: dataset: expected token ids from 0 to {VOCABULARY - 1}, got", lines)
    assert f"{Path('fastsae') / 'batches.py'}" not in err  # no traceback of ours
    assert "LostRankError" not in lines


@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_is_lost_ends_the_others(tmp_path, name):
    """The rank that fell says why; the other, that it misses it."""
    with pytest.raises(ChildFailedError) as failed:
        launch_ranks(RANKS, main, tmp_path, name)
    fell = json.loads((tmp_path / "fell.json").read_text())
    assert time.time() - fell["time"] < 20, "the others went on waiting"
    assert fell["rank"] == CASES[name]["rank"]
    said = tmp_path / f"error-{fell['rank']}"  # nothing, if it was killed: the agent says it then
    assert re.search(CASES[name]["says"], said.read_text() if said.exists() else str(failed.value))
    other = tmp_path / f"error-{1 - fell['rank']}"
    assert not other.exists() or other.read_text().startswith("LostRankError: rank")
