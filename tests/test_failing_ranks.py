"""A rank that fails ends all of them, in seconds, and it is its error that shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from failing_worker import CASES, main, prepare
from models import VOCABULARY, save_model, token_rows
from ranks import launch_ranks
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LIMIT = 60  # seconds for start and end, on a busy machine; a hang would take half an hour
SOON = 20  # seconds, in which all are to have ended


def ended(command: list[str]) -> tuple[int, str]:
    """(exit code, stderr)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stderr


def test_a_mistake_in_one_ranks_data_is_a_line_of_that_rank(tmp_path):
    save_model("gpt2", tmp_path / "model")
    rows = [row["input_ids"].tolist() for row in token_rows(63, 8)]
    Dataset.from_dict({"input_ids": [*rows, [VOCABULARY] * 8]}).to_parquet(tmp_path / "data.parquet")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--hookpoints", "h.1", "--num-latents", "64", "--k", "4", "--batch-size", "4"]
    data = [str(tmp_path / "model"), str(tmp_path / "data.parquet"), "--save-dir", str(tmp_path / "runs")]
    code, err = ended([*start, "-m", "fastsae", "train", *data, *options])
    assert code != 0
    lines = " ".join(err.split())
    assert re.search(rf"rank [01]: error: dataset: expected token ids from 0 to {VOCABULARY - 1}, got", lines)
    assert f"{Path('fastsae') / 'batches.py'}" not in err  # no traceback of ours
    assert "LostRankError" not in lines


def assert_all_ended(folder: Path, ranks: int, rank: int, says: str, agent: str) -> None:
    """The rank that fell says why; the others, that they miss it, each by itself."""
    fell = json.loads((folder / "fell.json").read_text())
    assert fell["rank"] == rank
    errors = {int(file.name[-1]): json.loads(file.read_text()) for file in folder.glob("error-*")}
    own = errors.pop(rank, None)  # none, if it was killed: the agent says it then
    assert re.search(says, own["error"] if own else agent)
    assert sorted(errors) == [other for other in range(ranks) if other != rank]
    for other, said in errors.items():
        assert said["error"].startswith(f"LostRankError: rank {other} stops: another rank ended")
        assert said["time"] - fell["time"] < SOON, "it went on waiting"


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_a_rank_that_is_lost_ends_the_others(tmp_path, ranks, name):
    with pytest.raises(ChildFailedError) as failed:
        launch_ranks(ranks, main, tmp_path, ranks, name)
    case = CASES[ranks][name]
    assert_all_ended(tmp_path, ranks, case["rank"], case["says"], str(failed.value))


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_while_others_wait_for_the_data_ends_them_too(tmp_path, which):
    """Else they would for half a day. Rank 1 fails when rank 0 is through and waits at what comes next."""
    with pytest.raises(ChildFailedError):
        launch_ranks(3, prepare, tmp_path, which)
    assert_all_ended(tmp_path, 3, which, "OSError: no space left for the tokens", "")
