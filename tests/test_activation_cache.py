"""Cached activations: what training on the fly sees, bit for bit; sizes, resumption after a kill, damage."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from models import make_model, save_model, token_rows
from test_cli import one_line, run

from fastsae import CachedActivations
from fastsae.activation_cache.index import Index, read_index
from fastsae.activation_cache.write import write_cache
from fastsae.errors import ArtifactError
from fastsae.hooks import run_hooked
from fastsae.rows import MapRows

ROWS, LENGTH = 7, 12
INDEX = Index(
    model="m", dataset="d", hookpoints={"h.0": 32, "h.1.mlp": 32}, inputs={"h.1.mlp": 32}, storage="float32",
    sequences=ROWS, ctx_len=LENGTH, shard_sequences=3,
)  # fmt: skip


def cached(folder, data, index=INDEX, exclude=()):
    written = write_cache(folder, index, make_model("gpt2"), MapRows(data), 2, exclude)
    assert written == read_index(folder)
    return CachedActivations(folder)


def on_the_fly(data, sequences, hookpoint, kept=None):
    """(input, output) [N, D] of each batch of ``sequences``, as the trainer's hook gets them."""
    model, ids = make_model("gpt2"), data["input_ids"][:]
    pairs = []
    for i in range(0, len(ids), sequences):
        keep = slice(None) if kept is None else kept[i : i + sequences].flatten()
        run_hooked(
            model, ids[i : i + sequences], {hookpoint: 1},
            lambda _n, x, y, keep=keep: pairs.append((x.flatten(0, 1)[keep], y.flatten(0, 1)[keep])),
        )  # fmt: skip
    return pairs


def test_batches_are_those_of_training_on_the_fly(tmp_path):
    data = token_rows(ROWS, LENGTH)
    cache = cached(tmp_path, data)
    assert (cache.tokens, cache.sequences, cache.hookpoints) == (ROWS * LENGTH, ROWS, {"h.0": 32, "h.1.mlp": 32})
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    batches = list(cache.batches(2))  # across the ends of shards
    truth = {name: on_the_fly(data, 2, name) for name in cache.hookpoints}
    assert len(batches) == 4
    for i, batch in enumerate(batches):
        for name in cache.hookpoints:
            x, y = batch[name]
            assert x is y
            assert torch.equal(y, truth[name][i][1])
    first = next(iter(cache.batches(2, transcode=True, hookpoints=("h.1.mlp",))))["h.1.mlp"]
    assert torch.equal(first[0], truth["h.1.mlp"][0][0])
    assert torch.equal(first[1], truth["h.1.mlp"][0][1])
    part = list(cache.batches(2, start=5, stop=7))
    assert torch.equal(part[0]["h.0"][1], torch.cat([t[1] for t in truth["h.0"]])[5 * LENGTH :])


def test_masked_and_excluded_tokens_are_not_stored(tmp_path):
    ids = token_rows(ROWS, LENGTH)["input_ids"][:]
    ids[:, 3] = 7
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()}).with_format("torch")
    cache = cached(tmp_path, data, exclude=(7,))
    kept = mask.bool() & (ids != 7)
    assert cache.tokens == int(kept.sum()) < ROWS * LENGTH
    batches = list(cache.batches(3))
    assert [len(batch["h.0"][0]) for batch in batches] == [int(kept[i : i + 3].sum()) for i in (0, 3, 6)]
    truth = on_the_fly(data, 3, "h.0", kept)  # causal: what comes before a token does not change with padding behind
    assert torch.equal(batches[1]["h.0"][1], truth[1][1])


def test_bfloat16_is_rounded_once_and_halves_the_size(tmp_path):
    data = token_rows(ROWS, LENGTH)
    index = dataclasses.replace(INDEX, storage="bfloat16")
    cache = cached(tmp_path, data, index)
    (batch,) = cache.batches(ROWS)
    (pair,) = on_the_fly(data, ROWS, "h.0")
    torch.testing.assert_close(batch["h.0"][1], pair[1].bfloat16(), rtol=0, atol=0)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 2 * index.total_bytes == INDEX.total_bytes + ROWS * 4
    assert index.total_bytes <= written <= index.total_bytes + 3 * 1024  # the headers


def test_shuffled_gives_every_token_once(tmp_path):
    data = token_rows(ROWS, LENGTH)
    cache = cached(tmp_path, data)
    every = torch.cat([batch["h.0"][1] for batch in cache.batches(ROWS)])

    def rows_of(**options):
        batches = [batch["h.0"][1] for batch in cache.shuffled(10, **options)]
        assert [len(batch) for batch in batches] == [10] * (sum(map(len, batches)) // 10) + [
            sum(map(len, batches)) % 10
        ]
        where = (torch.cat(batches)[:, None] == every[None]).all(-1)
        return where.float().argmax(1).tolist(), where.any(1).all()

    for options in ({"seed": 1}, {"seed": 1, "block": 5, "pool": 2}, {"seed": 1, "block": 1}):
        order, found = rows_of(**options)
        assert found
        assert sorted(order) == list(range(ROWS * LENGTH))
        assert order != sorted(order)
        assert order == rows_of(**options)[0]
        assert order != rows_of(**{**options, "seed": 2})[0]
    part, _ = rows_of(seed=0, start=2, stop=5)
    assert sorted(part) == list(range(2 * LENGTH, 5 * LENGTH))


def test_damage_is_found(tmp_path):
    cache = cached(tmp_path, token_rows(ROWS, LENGTH))
    assert list(cache.verify()) == [f"shard-0000{i}.safetensors" for i in range(3)]
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match="shard-00001.safetensors: its content is not what was written"):
        list(CachedActivations(tmp_path).verify())
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"expected {len(content)} bytes, got {len(content) - 1}"):
        CachedActivations(tmp_path)
    index = read_index(tmp_path)
    dataclasses.replace(index, shards=index.shards[:1]).save(tmp_path)
    with pytest.raises(ArtifactError, match="expected 7 sequences in .*, got 3; finish it"):
        CachedActivations(tmp_path)
    (tmp_path / "activations.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a readable index"):
        CachedActivations(tmp_path)
    with pytest.raises(ArtifactError, match="expected a folder written by fastsae cache"):
        CachedActivations(tmp_path / "nowhere")


@pytest.fixture
def command(tmp_path):
    """The command line that caches a small model's activations, without the folder."""
    model = save_model("gpt2", tmp_path / "model")
    token_rows(160, 64).to_parquet(tmp_path / "tokens.parquet")
    return [
        "cache", str(model), str(tmp_path / "tokens.parquet"), "--hookpoints", "h.*.mlp.act", "--shard-mib", "1",
        "--batch-size", "1", "--device", "cpu", "--storage", "float32", "--output",
    ]  # fmt: skip


def test_goes_on_after_a_kill(command, tmp_path, capsys):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsae", *command, str(folder), "--yes"], env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(folder.glob("shard-*.safetensors")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    before = read_index(folder)
    assert before.done < 160
    code, out, err = run(capsys, *command, str(folder), "--yes")
    assert code == 0, err
    assert "written" in out
    code, out, _ = run(capsys, *command, str(tmp_path / "whole"), "--yes")
    assert read_index(folder) == read_index(tmp_path / "whole")  # the hashes of every shard, too
    code, out, _ = run(capsys, *command, str(folder))
    assert code == 0
    assert f"complete: {len(read_index(folder).shards)} files as they were written" in out


def test_size_is_told_and_asked_for(command, tmp_path, capsys):
    code, out, err = run(capsys, *command, str(tmp_path / "new"))
    assert code == 2
    assert "error: yes: expected --yes where nobody can be asked" in one_line(err)
    assert "15.7 MB to write" in out  # 160 sequences of 64 tokens, 3 x 128 floats
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--storage", "bfloat16"], "holds a cache with storage = 'float32', not 'bfloat16'"),
        (["--exclude-tokens", "5"], "holds a cache with data ="),
        (["--hookpoints", "h.0.mlp.act"], "holds a cache with hookpoints ="),
        (["--hookpoints", "h.9"], "close matches"),
        (["--shard-mib", "0"], "error: shard_mib: expected at least 1, got 0"),
    ],
)
def test_another_cache_in_the_folder_is_refused(command, tmp_path, capsys, change, message):
    folder = tmp_path / "cache"
    index = Index(
        model=command[1], dataset=command[2], hookpoints={f"h.{i}.mlp.act": 128 for i in range(3)}, inputs={},
        storage="float32", sequences=160, ctx_len=64, shard_sequences=10,
    )  # fmt: skip
    folder.mkdir()
    index.save(folder)
    if "hookpoints" in change[0]:
        at = command.index("--hookpoints")
        command = command[:at] + command[at + 2 :]
    code, _, err = run(capsys, *command, str(folder), "--yes", *change)
    assert code == 2
    assert message in one_line(err)


def test_other_files_in_the_folder_are_left_alone(command, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    code, _, err = run(capsys, *command, str(tmp_path / "mine"), "--yes")
    assert code == 2
    assert "holds other files; choose another" in one_line(err)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
