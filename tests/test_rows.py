"""Rows with a cursor: order, batches, what is held out, and resuming at any point."""

import pytest
import torch
from datasets import Dataset
from models import token_rows

from fastsae.collation import collate
from fastsae.errors import ArtifactError, CheckpointError
from fastsae.rows import Batches, MapRows, split_held_out

ROWS = [{"input_ids": [i, i + 1]} for i in range(45)]


def ids(rows):
    return [int(row["input_ids"][0]) for row in rows]


def test_rows_come_once_and_in_order():
    rows = MapRows(ROWS, 3, 8)
    assert len(rows) == 5
    assert ids(rows.take(2)) == [3, 4]
    assert ids(rows.take(9)) == [5, 6, 7]
    assert rows.take(1) == []
    assert len(rows) == 5


@pytest.mark.parametrize("data", [ROWS, token_rows(45, 2)])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_are_those_of_a_data_loader(data, batch_size):
    from torch.utils.data import DataLoader

    batches = Batches(MapRows(data), batch_size)
    expected = list(DataLoader(data, batch_size=batch_size, collate_fn=collate))
    assert len(batches) == len(expected)
    for batch, same in zip(batches, expected, strict=True):
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], same["input_ids"])


@pytest.mark.parametrize(("wanted", "train", "held_out"), [(64, 43, [43, 44]), (1, 44, [44]), (0, 45, [])])
def test_the_last_rows_are_held_out_at_most_a_twentieth(wanted, train, held_out):
    rows, kept = split_held_out(ROWS, wanted)
    assert len(rows) == train
    assert ids(rows.take(99)) == list(range(train))
    assert ids(kept.take(99)) == held_out


@pytest.mark.parametrize("taken", [0, 1, 7, 44, 45])
def test_a_restored_cursor_goes_on_with_the_next_row(taken):
    rows = MapRows(ROWS)
    rows.take(taken)
    state = rows.state_dict()
    again = MapRows(ROWS)
    again.load_state_dict(state)
    assert ids(again.take(99)) == list(range(taken, 45))


def test_batches_read_nothing_ahead():
    rows = MapRows(ROWS)
    batches = iter(Batches(rows, 4))
    next(batches)
    next(batches)
    assert rows.state_dict()["next"] == 8


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ROWS[:-1], "with rows = 45, got 44"),
        (ROWS[::-1], "with checksum = "),
    ],
)
def test_the_cursor_of_other_data_is_refused(other, message):
    with pytest.raises(CheckpointError, match=message):
        MapRows(other).load_state_dict(MapRows(ROWS).state_dict())


@pytest.mark.parametrize("value", ["text", None, [1.5, 2.0], [[1, 2]], ["a"], 3, [1, None]])
def test_rows_that_hold_no_token_ids(value):
    with pytest.raises(ArtifactError, match="expected a list of integers per row in 'input_ids', got"):
        collate([{"input_ids": value}])


@pytest.mark.parametrize(
    ("dataset", "came"),
    [
        ([[1, 2], [3, 4]], "got list of list"),
        (torch.ones(3, 4, dtype=torch.int64), "got Tensor of Tensor"),
        (Dataset.from_dict({"text": ["a"]}), "got Dataset with text"),
        (({"input_ids": [1]} for _ in range(3)), "got generator;"),
        (torch.utils.data.DataLoader([{"input_ids": [1]}]), "got DataLoader;"),
        ({"input_ids": [[1, 2]]}, r"got dict, which knows no \[0\]"),
        ("stdlib", "got str of str"),
    ],
)
def test_what_is_no_dataset_is_said_at_once(dataset, came):
    with pytest.raises(ArtifactError, match=rf"dataset: expected rows like .*, {came}"):
        split_held_out(dataset, 1)
