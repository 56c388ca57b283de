"""Replicas in real processes: together they train what a single process does on the joined batches."""

from __future__ import annotations

import json

import pytest
import torch
from replicas_worker import train
from test_spread import launch_worker

from fastsae.distributed.world import World


@pytest.mark.parametrize("loss_fn", ["fvu", "ce", "kl"])
def test_replicas_equal_a_single_process_on_the_joined_batches(tmp_path, loss_fn):
    launch_worker("replicas_worker.py", 3, str(tmp_path), loss_fn)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]  # to the bit
    one = train(tmp_path / "one", World(), loss_fn)
    assert ranks[0]["tokens"] == one.tokens
    assert ranks[0]["held_out"] == pytest.approx(one.held_out_metrics()["h.1"], rel=1e-4)
    for name, value in one.coders["h.1"].state_dict().items():
        torch.testing.assert_close(torch.tensor(ranks[0]["weights"][name]), value, rtol=1e-3, atol=1e-4)
    logs = [
        [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, tmp_path / "one")
    ]
    for ours, single in zip(*logs, strict=True):
        for key in single.keys() - {"tokens_per_second"}:
            assert ours[key] == pytest.approx(single[key], rel=1e-3), key
