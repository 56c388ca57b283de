"""Replicas in real processes, on one machine and on two: together they train what one process does on all batches."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import launch_ranks
from replicas_worker import CASES, main, train

from fastsae import SaeConfig, TrainConfig, Trainer
from fastsae.distributed.world import World
from fastsae.errors import ConfigError

RANKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What all ranks did, every case in one start."""
    folder = tmp_path_factory.mktemp("replicas")
    launch_ranks(RANKS, main, folder, *CASES)
    return folder


def read(folder: Path, name: str, ranks: int = RANKS) -> list[dict]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def assert_same_run(folder: Path, ranks: list[dict], one: Trainer, case: str, *, atol: float = 1e-4) -> None:
    assert all(rank == ranks[0] for rank in ranks)  # to the bit
    assert ranks[0]["tokens"] == one.tokens
    rel = 1e-4 if case in ("fvu", "ce", "kl") else 1e-2
    assert ranks[0]["held_out"] == pytest.approx(one.held_out_metrics()["h.1"], rel=rel)
    for name, value in one.coders["h.1"].state_dict().items():
        torch.testing.assert_close(torch.tensor(ranks[0]["weights"][name]), value, rtol=1e-3, atol=atol, msg=name)
    assert one.folder is not None
    logs = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder / case, one.folder)
    ]
    for ours, single in zip(*logs, strict=True):
        for key in single.keys() - {"tokens_per_second"}:  # dead latents among them: counted over all ranks
            assert ours[key] == pytest.approx(single[key], rel=10 * rel), key


@pytest.mark.parametrize("case", ["fvu", "ce", "kl"])
def test_replicas_equal_a_single_process_on_the_joined_batches(folder, tmp_path, case):
    assert_same_run(folder, read(folder, case), train(tmp_path, World(), case), case)


@pytest.mark.parametrize("case", ["adam8bit", "signum", "muon", "bfloat16"])
def test_so_do_other_optimizers_and_narrow_gradients(folder, tmp_path, case):
    one = train(tmp_path, World(), case)
    ranks = read(folder, case)
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0]["held_out"]["fvu"] == pytest.approx(one.held_out_metrics()["h.1"]["fvu"], rel=1e-2)
    for name, value in one.coders["h.1"].state_dict().items():
        got = torch.tensor(ranks[0]["weights"][name])
        assert (got - value).norm() < 0.02 * value.norm(), name  # signs and 8-bit codes turn on rounding errors


def test_one_reduction_per_step_whatever_is_accumulated_and_chunked(folder):
    wide, narrow = read(folder, "fvu-counted")[0], read(folder, "bfloat16-counted")[0]
    # tokens of both batches; mean and spread of each, for FVU; then once per step latents, small tensors, two matrices
    assert wide["calls"] == {"all_gather": 1, "all_reduce": 2 + 1 + 1 + 2}
    assert narrow["calls"] == {"all_gather": 1, "all_reduce": 2 + 1 + 1 + 1}  # both at once
    matrices = 2 * 64 * 32 * 4
    small = 64 + 3 * 8 + 2 * (32 + 2) * 8 + 200 * 4  # codes, counts, means, biases and sums: at most
    assert matrices <= wide["bytes"] <= matrices + small
    assert wide["bytes"] - narrow["bytes"] >= matrices / 2 - 100  # half of it stays at home


def test_two_machines_are_as_one(tmp_path):
    """Two agents of torchrun with a process each: their ranks choose data, their local ranks devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {
        "run_id": "two",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"127.0.0.1:{port}",
        "min_nodes": 2,
        "max_nodes": 2,
    }
    with ThreadPoolExecutor(2) as agents:
        nodes = [
            agents.submit(launch_ranks, 1, main, tmp_path, "fvu", **meeting, rdzv_configs={"rank": node, "timeout": 60})
            for node in range(2)
        ]
    for node in nodes:
        node.result()
    places = read(tmp_path, "place", 2)
    assert [(p["rank"], p["local_rank"], p["local_size"]) for p in places] == [(0, 0, 1), (1, 0, 1)]
    assert [p["environment"] for p in places] == [[0, 0, 0], [1, 0, 1]]
    assert_same_run(tmp_path, read(tmp_path, "fvu", 2), train(tmp_path / "one", World(), "fvu"), "fvu")


def test_a_trainer_says_that_its_process_has_not_joined_the_others(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"expected one of the 2 processes .* to have joined the others.*joined\(\)"):
        Trainer(TrainConfig(SaeConfig(num_latents=64, k=4)), [], None)  # type: ignore[arg-type]
