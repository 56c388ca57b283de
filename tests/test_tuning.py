"""Opt-in timing of tile sizes: the fastest wins, is kept, and nothing that goes wrong on the way stops a training."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from fastsae_kernels import tuning

SHAPE = {"D": 64, "L": 512, "k": 8}


@dataclass(frozen=True)
class Tile:
    BLOCK: int
    num_warps: int = 4


TILES = [Tile(16), Tile(32), Tile(64)]
MILLISECONDS = {Tile(16): 3.0, Tile(32): 1.0, Tile(64): 2.0}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of this test's own, and no memory of other tests."""
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path / "cache"


class Bench:
    """Runs nothing, and says how long it took."""

    def __init__(self, milliseconds=MILLISECONDS, raises=()):
        self.milliseconds, self.raises, self.ran = milliseconds, raises, []

    def __call__(self, tile):
        self.ran.append(tile)
        if tile in self.raises:
            raise RuntimeError("out of shared memory")

    def timer(self, run):
        run()
        return self.milliseconds[self.ran[-1]]

    def tuned(self, candidates=TILES, shape=SHAPE, dtype=torch.bfloat16, device="GPU A"):
        return tuning.tuned("encode", shape, dtype, device, candidates, self, self.timer)


def forget() -> None:
    """What another process would know: the file alone."""
    tuning._chosen.clear()


def test_the_fastest_is_chosen_and_timed_once(home):
    bench = Bench()
    assert bench.tuned() == Tile(32)
    assert bench.ran == TILES
    assert bench.tuned() == Tile(32)
    assert bench.ran == TILES  # from memory
    ((key, kept),) = json.loads((home / "tuning.json").read_text()).items()
    assert kept == {"BLOCK": 32, "num_warps": 4}
    assert key.startswith("encode|D=64|L=512|k=8|torch.bfloat16|GPU A|")


def test_a_kept_winner_is_not_timed_again():
    Bench().tuned()
    forget()
    later = Bench({tile: 1.0 for tile in TILES})
    assert later.tuned() == Tile(32)
    assert later.ran == []


def test_a_kept_winner_that_is_no_candidate_any_more_is_timed_again():
    Bench().tuned()
    forget()
    bench, shipped = Bench(), [Tile(16), Tile(64)]
    assert bench.tuned(shipped) == Tile(64)
    assert bench.ran == shipped


@pytest.mark.parametrize("change", [
    {"shape": SHAPE | {"k": 16}}, {"dtype": torch.float32}, {"device": "GPU B"},
])  # fmt: skip
def test_another_shape_dtype_or_gpu_is_timed_for_itself(change, home):
    Bench().tuned()
    other = Bench({Tile(16): 1.0, Tile(32): 2.0, Tile(64): 3.0})
    assert other.tuned(**change) == Tile(16)
    assert other.ran == TILES
    forget()
    assert Bench().tuned() == Tile(32)
    assert len(json.loads((home / "tuning.json").read_text())) == 2


def test_another_triton_is_timed_for_itself(monkeypatch):
    Bench().tuned()
    monkeypatch.setattr(tuning.triton, "__version__", "99.0.0")
    bench = Bench()
    bench.tuned()
    assert bench.ran == TILES


def test_a_candidate_that_raises_is_out(caplog):
    bench = Bench(raises=[Tile(32)])
    with caplog.at_level(logging.INFO, logger=tuning.log.name):
        assert bench.tuned() == Tile(64)
    assert bench.ran == TILES
    assert "Tile(BLOCK=32, num_warps=4) does not run: out of shared memory" in caplog.text


def test_the_default_where_none_runs(home):
    assert Bench(raises=TILES).tuned() == TILES[0]
    assert not (home / "tuning.json").exists()  # nothing was measured: nothing is kept


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO, logger=tuning.log.name):
        assert Bench().tuned() == Tile(32)
    assert "tuning: not kept in" in caplog.text
    again = Bench()
    assert again.tuned() == Tile(32)
    assert again.ran == []


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_a_broken_file_is_replaced(text, home):
    home.mkdir()
    (home / "tuning.json").write_text(text, encoding="latin-1")
    assert Bench().tuned() == Tile(32)
    assert len(json.loads((home / "tuning.json").read_text())) == 1
    assert [path.name for path in home.iterdir()] == ["tuning.json"]  # no half-written file is left


def test_where_winners_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file() == tmp_path / "cache" / "tuning.json"
    monkeypatch.delenv("FASTSAE_CACHE")
    assert tuning.cache_file() == tmp_path / "xdg" / "fastsae" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / ".cache" / "fastsae" / "tuning.json"


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("0", False), ("1", True)])
def test_off_unless_asked_for(value, asked, monkeypatch):
    if value is None:
        monkeypatch.delenv("FASTSAE_AUTOTUNE", raising=False)
    else:
        monkeypatch.setenv("FASTSAE_AUTOTUNE", value)
    assert tuning.enabled() is asked


def test_the_encoders_key_does_not_know_the_number_of_tokens(monkeypatch):
    """As on a GPU: batches of 1, 17 and 5000 tokens ask for one tuning, of at most 4096 tokens."""
    from importlib import import_module

    encode = import_module("fastsae_kernels.encode")

    class OnGpu(torch.Tensor):
        is_cuda = property(lambda self: True)

    asked, timed = [], []

    def tuned(kernel, shape, dtype, device_name, candidates, run):
        asked.append((kernel, shape, dtype, device_name))
        run(candidates[0])
        return candidates[0]

    monkeypatch.setenv("FASTSAE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "tuned", tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU A")
    monkeypatch.setattr(encode, "_encode_fused", lambda x, *_: timed.append(len(x)))
    weight, bias = torch.zeros(512, 64), torch.zeros(512)
    for tokens in (1, 17, 5000):
        encode._fused_config(torch.zeros(tokens, 64).as_subclass(OnGpu), weight, bias, 8)
    assert asked == [("encode", {"D": 64, "L": 512, "k": 8}, torch.float32, "GPU A")] * 3
    assert timed == [1, 17, 4096]
