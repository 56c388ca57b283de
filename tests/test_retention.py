"""Which checkpoints stay: the last few, the best, and the newest whole one."""

import json
import os

import pytest
import torch

from fastsae import FastSae, SaeConfig
from fastsae.errors import CheckpointError
from fastsae.retention import best_so_far, keep_last, newest_whole, save_if_best, save_step, saved_steps


@pytest.fixture
def coder():
    return FastSae(6, SaeConfig(num_latents=20, k=3))


def save(run, coder, *steps):
    for step in steps:
        coder.b_dec.data.fill_(step)
        save_step(run, step, lambda folder: coder.save_to_disk(folder / "h.0"))


def test_the_last_few_stay(tmp_path, coder):
    save(tmp_path, coder, 8, 9, 10, 100)
    assert saved_steps(tmp_path) == [8, 9, 10, 100]
    assert keep_last(tmp_path, 2) == [8, 9]
    assert saved_steps(tmp_path) == [10, 100]
    assert keep_last(tmp_path, 2) == []
    assert FastSae.load_many(tmp_path / "steps/10", local=True)["h.0"].b_dec.unique().tolist() == [10]
    with pytest.raises(ValueError, match="at least 1"):
        keep_last(tmp_path, 0)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path, coder):
    save(tmp_path, coder, 1, 2)

    def fail(folder):
        coder.save_to_disk(folder / "h.0")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 3, fail)
    assert saved_steps(tmp_path) == [1, 2]
    assert newest_whole(tmp_path) == 2
    keep_last(tmp_path, 5)
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["1", "2"]
    save(tmp_path, coder, 2, 3)  # again, after a resume
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_the_newest_whole_one_is_used_and_damaged_ones_are_named(tmp_path, coder, caplog):
    assert newest_whole(tmp_path) is None
    save(tmp_path, coder, 1, 2, 3)
    os.truncate(tmp_path / "steps/3/h.0/sae.safetensors", 300)
    (tmp_path / "steps/4").mkdir()
    assert newest_whole(tmp_path) == 2
    assert caplog.messages[0] == "step 4 is not used: it holds no coders"
    assert caplog.messages[1].startswith(f"step 3 is not used: {tmp_path / 'steps/3/h.0/sae.safetensors'}: not a read")


def test_the_best_stays(tmp_path, coder):
    def offer(fvu, step, name="h.0"):
        coder.b_dec.data.fill_(step)
        return save_if_best(tmp_path, name, fvu, step, coder.save_to_disk)

    assert [offer(0.5, 1), offer(0.6, 2), offer(float("nan"), 3), offer(0.4, 4), offer(0.4, 5)] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert offer(0.9, 6, "h.1/seed0")
    assert best_so_far(tmp_path) == {"h.0": {"fvu": 0.4, "step": 4}, "h.1/seed0": {"fvu": 0.9, "step": 6}}
    best = FastSae.load_many(tmp_path / "best", local=True)
    assert {name: sae.b_dec.unique().tolist() for name, sae in best.items()} == {"h.0": [4], "h.1/seed0": [6]}
    assert torch.equal(best["h.0"].encoder.weight, coder.encoder.weight)
    (tmp_path / "best/best.json").write_text("{")
    with pytest.raises(CheckpointError, match="best.json: not readable as JSON"):
        offer(0.1, 7)
    json.dumps(best_so_far(tmp_path / "elsewhere"))
