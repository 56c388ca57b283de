"""What ranks say to each other in an optimizer step where coders are shared out or split: every call, every byte.

Shapes: N tokens of a batch on a rank, M on all ranks that train a coder together, D width.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from collectives_worker import BATCHES, LATENTS, LENGTH, MODULES, SPLIT, WIDTH, K, main
from ranks import launch_ranks

RANKS = 4
OWNERS = {
    "variants": [{0, 1, 2, 3}],
    "transcoders": [{0}, {0}, {1}, {1}],
}
"""The ranks that want rows: of every hookpoint, of transcoders for inputs and for outputs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collectives")
    launch_ranks(RANKS, main, folder)
    return folder


def read(folder: Path, mode: str, name: str) -> list[dict]:
    return [json.loads((folder / f"{mode} {name} {rank}.json").read_text()) for rank in range(RANKS)]


class Expected:
    """Calls and bytes by kind; in every mode one gathering: the stop signal and the tokens of both batches, 8 bytes."""

    def __init__(self) -> None:
        self.calls, self.bytes = Counter({"all_gather": 1}), Counter({"all_gather": 8 * 3})

    def add(self, kind: str, size: int, calls: int = 1) -> None:
        self.calls[kind] += calls
        self.bytes[kind] += calls * size

    def exchange(self, rank: int, rows: dict[int, int], owners: set[int], itemsize: int) -> None:
        """Rows [N, D] go to each owner once, from whoever has any."""
        tokens = {member: count * LENGTH for member, count in rows.items() if count}
        if rank in tokens:
            self.add("isend", tokens[rank] * WIDTH * itemsize, len(owners - {rank}))
        for member in tokens.keys() - {rank} if rank in owners else ():
            self.add("irecv", tokens[member] * WIDTH * itemsize)

    def check(self, record: dict) -> None:
        assert record["calls"] == +self.calls
        assert record["bytes"] == +self.bytes


def parts(tokens: int, wanted: int) -> int:
    """Micro-batches that so many tokens are trained in."""
    return -(-tokens // -(-tokens // wanted))


@pytest.mark.parametrize("name", MODULES)
def test_to_owners_go_rows_once_each_and_nothing_else(folder, name):
    """However many coders an owner has at a hookpoint, and in however many micro-batches it trains them."""
    dtype, itemsize = ("bfloat16", 2) if name == "bfloat16" else ("float32", 4)
    for rank, record in enumerate(read(folder, "modules", name)):
        expected = Expected()
        for batch in BATCHES:
            for owners in OWNERS.get(name, [{0}, {1}, {2}]):
                expected.exchange(rank, dict(enumerate(batch)), owners, itemsize)
        expected.check(record)
        assert record["dtypes"]["isend"] == [dtype]
        assert record["dtypes"].get("irecv", [dtype]) == [dtype]


def test_micro_batches_cost_owners_no_call(folder):
    plain, chunked = read(folder, "modules", "plain"), read(folder, "modules", "parts")
    assert [(record["calls"], record["bytes"]) for record in chunked] == [
        (record["calls"], record["bytes"]) for record in plain
    ]


@pytest.mark.parametrize("name", SPLIT)
def test_slices_exchange_rows_candidates_and_sums(folder, name):
    """Of each micro-batch: K candidates of 8 bytes per token, the decoded rows' sum in float32, and b_dec's share."""
    options = SPLIT[name]
    joined, hookpoints = options.get("distribute_latents", RANKS), len(options["hookpoints"])
    coders = hookpoints * len(options.get("init_seeds", (0,)))
    for rank, record in enumerate(read(folder, "latents", name)):
        expected, group = Expected(), range(rank // joined * joined, rank // joined * joined + joined)
        for batch in BATCHES:
            rows = {member: batch[member] for member in group}
            for _ in range(hookpoints):
                expected.exchange(rank, rows, set(group), 2 if name == "bfloat16" else 4)
            tokens = sum(rows.values()) * LENGTH  # M
            pieces = parts(tokens, options.get("micro_acc_steps", 1))
            for _ in range(coders):
                expected.calls.update({"all_gather": pieces, "all_reduce": 2 * pieces})
                expected.bytes.update({"all_gather": 8 * tokens * K, "all_reduce": 4 * WIDTH * (tokens + pieces)})
        if "max_grad_norm" in options:
            expected.add("all_reduce", 4, coders)
        if joined < RANKS:
            add_replicas(expected, LATENTS // joined, coders, record)
        expected.check(record)
        assert record["dtypes"]["isend"] == ["bfloat16" if name == "bfloat16" else "float32"]


def add_replicas(expected: Expected, own: int, coders: int, record: dict) -> None:
    """Between groups, in micro-batches or not: variances by batch; codes, small tensors, both matrices by step."""
    assert record["active"] > 0.9 * coders * own  # else rows of active latents alone would travel
    expected.add("all_reduce", 8 * (WIDTH + 2), coders * len(BATCHES))
    expected.add("all_reduce", coders * own)
    expected.add("all_reduce", 4 * sum(own + WIDTH + sums for sums in record["sums"].values()))
    expected.add("all_reduce", 4 * own * WIDTH, 2 * coders)


def test_micro_batches_add_calls_between_slices_and_next_to_no_bytes(folder):
    """Candidates are chosen in each micro-batch: three make three times the gatherings, beside that of the tokens."""
    for name, chunked in (("plain", "parts"), ("replicas", "replicas in parts")):
        for few, many in zip(read(folder, "latents", name), read(folder, "latents", chunked), strict=True):
            assert many["calls"]["all_gather"] - 1 == 3 * (few["calls"]["all_gather"] - 1)
            assert many["bytes"]["all_gather"] == few["bytes"]["all_gather"]
            assert many["bytes"]["isend"] == few["bytes"]["isend"]
            assert many["bytes"]["all_reduce"] - few["bytes"]["all_reduce"] == 2 * 2 * 2 * 4 * WIDTH  # b_dec's
