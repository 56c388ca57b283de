"""Token ids in .bin files: types, rows, order, and files that cannot be what they are said to be."""

import json

import numpy as np
import pytest
import torch

from fastsae.collation import collate
from fastsae.errors import ArtifactError
from fastsae.memmap import MemmapTokens
from fastsae.rows import MapRows

IDS = np.arange(1, 103) * 7


def write(folder, dtype="uint16", ids=IDS):
    (path := folder / "tokens.bin").write_bytes(ids.astype(dtype).tobytes())
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_are_the_files_ids_without_the_unfinished_last(tmp_path, dtype):
    tokens = MemmapTokens(write(tmp_path, dtype), 10, dtype)
    assert len(tokens) == 10
    batch = collate([tokens[i] for i in range(10)])["input_ids"]
    assert torch.equal(batch, torch.arange(1, 101).view(10, 10) * 7)
    assert batch.dtype == torch.int64


def test_the_same_rows_as_sparsifys(tmp_path):
    sparsify = pytest.importorskip("sparsify.data", reason="needs eai-sparsify")
    path = write(tmp_path, ids=IDS[:100])
    theirs, ours = sparsify.MemmapDataset(str(path), 10, dtype=np.uint16), MemmapTokens(path, 10)
    assert len(ours) == len(theirs)
    assert all(torch.equal(ours[i]["input_ids"], theirs[i]["input_ids"]) for i in range(10))


def test_large_ids_keep_their_value_in_uint32(tmp_path):
    ids = np.array([70_000, 4_000_000_000, 1])
    row = MemmapTokens(write(tmp_path, "uint32", ids), 3, "uint32")[0]["input_ids"]
    assert row.tolist() == [70_000, 4_000_000_000, 1]


def test_a_side_file_names_the_type(tmp_path, caplog):
    path = write(tmp_path, "uint32")
    (side := tmp_path / "tokens.bin.json").write_text(json.dumps({"dtype": "uint32"}))
    assert MemmapTokens(path, 2)[1]["input_ids"].tolist() == [21, 28]
    side.write_text(json.dumps({"dtype": "int8"}))
    with pytest.raises(ArtifactError, match='"uint32" in tokens.bin.json, got neither'):
        MemmapTokens(path, 2)
    side.unlink()
    with pytest.raises(ArtifactError, match="a 0 in every second place, as uint32 ids have; choose with --bin-dtype"):
        MemmapTokens(path, 2)


def test_shuffled_rows_are_a_permutation_that_the_seed_chooses(tmp_path):
    tokens = MemmapTokens(write(tmp_path), 2)

    def first(tokens):
        return [int(row["input_ids"][0]) for row in MapRows(tokens).take(99)]

    plain, one = first(tokens), first(tokens.shuffle(1))
    assert first(tokens.shuffle(1)) == one != first(tokens.shuffle(2))
    assert sorted(one) == plain
    assert first(tokens.shuffle(1).select(range(5))) == one[:5]


def test_damaged_and_short_files(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ArtifactError, match="at least 103 tokens in tokens.bin, got 102; lower --ctx-len"):
        MemmapTokens(path, 103)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="uint16 ids, 2 bytes each, got 203 bytes; is the file cut off"):
        MemmapTokens(path, 10)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="at least 10 tokens in tokens.bin, got 0"):
        MemmapTokens(path, 10)
