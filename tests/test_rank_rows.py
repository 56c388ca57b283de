"""Which rows of the data each rank trains on, row by row: none twice, none lost, in the order of one process."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
from rank_rows_worker import (
    CASES,
    LENGTH,
    RESUMED,
    TOGETHER,
    Case,
    Recorder,
    load_rows,
    main,
    make_trainer,
    name_of,
    write_data,
)
from ranks import launch_ranks

LAST = {
    (1, 2): (0, 1), (2, 2): (1, 1), (5, 2): (2, 3), (6, 2): (3, 3),
    (1, 3): (0, 0, 1), (2, 3): (0, 1, 1), (5, 3): (1, 2, 2), (6, 3): (2, 2, 2),
}  # fmt: skip
"""How many rows of the last batch each rank has, by how many these are, and the number of ranks."""

ALONE = sorted({(kind, rows) for kind, rows, _ in (*CASES, *RESUMED)})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data) -> dict[tuple[str, int], dict]:
    """What one process trains on, by kind of data and number of rows."""
    folder, records = tmp_path_factory.mktemp("alone"), {}
    for kind, rows in ALONE:
        recorder = Recorder(make_trainer(folder, data, (kind, rows, "replicas"), 1))
        recorder.trainer.fit(progress=False)
        records[kind, rows] = recorder.record()
    return records


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory, data) -> tuple[int, Path]:
    """(how many, what each of them wrote)."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    launch_ranks(request.param, main, folder, data)
    return request.param, folder


def read(ranks: tuple[int, Path], what: str, case: Case) -> list[dict]:
    count, folder = ranks
    return [json.loads((folder / f"{what} {name_of(case)} {rank}.json").read_text()) for rank in range(count)]


def parts(batch: list[int], sizes: tuple[int, ...]) -> list[list[int]]:
    """``batch`` in pieces of these sizes, one behind another."""
    assert len(batch) == sum(sizes)
    ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
    return [batch[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def shared_out(alone: dict, count: int) -> list[list[list[list[int]]]]:
    """What each of ``count`` ranks is to train on, of a process's steps of batches: [rank][step][batch]."""
    even, steps = (TOGETHER // count,) * count, alone["steps"]
    sizes = [[even for _ in step] for step in steps]
    sizes[-1][-1] = LAST[len(steps[-1][-1]), count]
    split = [[parts(*one) for one in zip(*both, strict=True)] for both in zip(steps, sizes, strict=True)]
    return [[[batch[rank] for batch in step] for step in split] for rank in range(count)]


@pytest.mark.parametrize(("kind", "rows"), ALONE)
def test_one_process_trains_on_every_row_but_those_held_out(data, alone, kind, rows):
    """Held out are of streams the first rows drawn, else the last, a twentieth of them, or of a stream's limit."""
    source, record = load_rows(data, kind, rows), alone[kind, rows]
    held = {"short": 3}.get(kind, rows // 20)
    stream = kind in ("stream", "short")
    taken = source.take(rows + 1) if stream else source
    order = [int(row["input_ids"][0]) - 1 for row in taken]
    trained, held_out = (list(chain(*chain(*steps))) for steps in (record["steps"], [record["held_out"]]))
    assert sorted(order) == list(range(rows))
    assert order != sorted(order)
    assert held_out == (order[:held] if stream else order[-held:])
    assert trained == (order[held:] if stream else order[:-held])
    assert record["tokens"] == LENGTH * (rows - held)
    whole, left = divmod(rows - held, TOGETHER)
    assert [len(batch) for batch in chain(*record["steps"])] == [TOGETHER] * whole + [left] * (left > 0)
    assert [len(step) for step in record["steps"][:-1]] == [2] * (record["step"] - 1)  # batches in a step


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ranks_share_out_each_batch_in_order(alone, ranks, case):
    kind, rows, _ = case
    one, records = alone[kind, rows], read(ranks, "whole", case)
    assert [record["steps"] for record in records] == shared_out(one, ranks[0])
    assert list(chain(*(chain(*record["held_out"]) for record in records))) == list(chain(*one["held_out"]))
    assert {(record["step"], record["tokens"]) for record in records} == {(one["step"], one["tokens"])}


@pytest.mark.parametrize("case", RESUMED, ids=name_of)
def test_a_stopped_run_goes_on_with_the_very_next_row(alone, ranks, case):
    """It ended after its third step, of which the state that was saved after the second knows nothing."""
    kind, rows, _ = case
    wanted = shared_out(alone[kind, rows], ranks[0])
    assert [record["steps"] for record in read(ranks, "stopped", case)] == [steps[:3] for steps in wanted]
    resumed = read(ranks, "resumed", case)
    assert [record["steps"] for record in resumed] == [steps[2:] for steps in wanted]
    assert {(record["step"], record["tokens"]) for record in resumed} == {(4, alone[kind, rows]["tokens"])}


@pytest.mark.parametrize("case", RESUMED, ids=name_of)
def test_so_does_a_single_process_with_what_several_left(data, alone, ranks, case):
    kind, rows, _ = case
    run = f"copied {name_of(case)}"
    recorder = Recorder(make_trainer(ranks[1], data, (kind, rows, "replicas"), 1, run))
    recorder.trainer.resume(ranks[1] / run)
    recorder.trainer.fit(progress=False)
    assert recorder.steps == alone[kind, rows]["steps"][2:]
    assert recorder.trainer.tokens == alone[kind, rows]["tokens"]
