"""Rows of token ids in one fixed order, with a cursor that can be saved and restored; batches of them.

Shapes: B rows in a batch, S tokens in a row. Whatever a run reads (a map-style dataset, a memory map, a
stream), the trainer sees a :class:`RowSource`. Its ``state_dict`` says where it stands, after exactly the rows
that were taken: a source made in the same way that loads this state goes on with the very next row.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .collation import Row, check_rows, collate, idle, token_ids
from .errors import CheckpointError


class RowSource(ABC):
    """Rows in one fixed order, each given once."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows in all, from the first, wherever the cursor is; of a stream, the most it will give."""

    @property
    def sequences(self) -> int:
        """Sequences that rows can be held out of; a row is one, unless a source says otherwise."""
        return len(self)

    @abstractmethod
    def take(self, count: int) -> list[Row]:
        """The next ``count`` rows; fewer at the end, and none behind it."""

    def take_part(self, count: int, part: Callable[[int], range]) -> tuple[list[Row], int]:
        """Those of the next ``count`` rows whose positions are in ``part(rows there)``, and how many there were.

        The cursor moves over all of them: ranks that take parts of the same rows stay together.
        """
        rows = self.take(count)
        return [rows[i] for i in part(len(rows))], len(rows)

    @abstractmethod
    def hold_out(self, count: int) -> RowSource:
        """Set ``count`` rows apart, before any is taken: the source returned gives them, this one no longer does."""

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """A batch of ``rows``; of none, one with nothing to train on, on which the model runs all the same."""
        return collate(rows) if rows else idle()

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor is: plain numbers, texts, lists, dicts, and tensors."""
        return self.snapshot()()

    @abstractmethod
    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Remember where the cursor is, at little cost; the function returned gives that ``state_dict`` later."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there; raises :class:`CheckpointError` where the state is of other data."""


class IndexedRows(RowSource):
    """Rows that can be read in any order: the cursor is an index."""

    _next = 0

    @abstractmethod
    def _read(self, positions: list[int]) -> list[Row]:
        """The rows at these positions, counted from the source's first."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What a state must agree with to be of this data."""

    def take(self, count: int) -> list[Row]:
        return self.take_part(count, range)[0]

    def take_part(self, count: int, part: Callable[[int], range]) -> tuple[list[Row], int]:
        """Only the part is read."""
        here, self._next = self._next, min(self._next + count, len(self))
        return self._read([here + i for i in part(self._next - here)]), self._next - here

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        here = self._next
        return lambda: {**self._identity(), "next": here}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_data(self._identity(), state)
        self._next = int(state["next"])


class MapRows(IndexedRows):
    """The rows ``start`` to ``stop`` of anything with ``len`` and ``[i]``."""

    def __init__(self, dataset: Any, start: int = 0, stop: int | None = None):
        self._dataset, self._start = dataset, start
        self._count = max(0, (len(dataset) if stop is None else stop) - start)

    def __len__(self) -> int:
        return self._count

    def hold_out(self, count: int) -> MapRows:
        """The last ``count`` rows."""
        end = self._start + self._count
        self._count -= count
        return MapRows(self._dataset, end - count, end)

    def _read(self, positions: list[int]) -> list[Row]:
        indices = [self._start + i for i in positions]
        many = getattr(self._dataset, "__getitems__", None)
        return list(many(indices)) if many and indices else [self._dataset[i] for i in indices]

    def _identity(self) -> dict[str, Any]:
        """With a checksum of the first and last row: other data, or another order, hardly ever agree in both."""
        ends = (self._start, self._start + self._count - 1) if self._count else ()
        ids = b"".join(token_ids(self._dataset[i]["input_ids"]).numpy().tobytes() for i in ends)
        return {"kind": "map", "rows": self._count, "checksum": zlib.crc32(ids)}


class Batches:
    """Batches of a source's rows, in order: dicts of ``input_ids [B, S]`` int64 (and ``attention_mask``).

    Nothing is read ahead: between two batches, the source's ``state_dict`` is the state of the batches given.
    ``pin`` puts them into page-locked memory, for faster copies to a GPU. ``part(rows in a batch)`` says which of a
    batch's rows are given, where others take the rest; without any, one row comes with ``counts [1, S]`` false: its
    tokens are not trained on, but the model runs on it as elsewhere.
    """

    def __init__(self, rows: RowSource, batch_size: int, *, pin: bool = False, part: Callable[[int], range] = range):
        self.rows, self.batch_size, self._pin, self._part = rows, batch_size, pin, part

    def __len__(self) -> int:
        """Batches in all, from the first row; the last may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while (taken := self.rows.take_part(self.batch_size, self._part))[1]:
            batch = self.rows.collate(taken[0])
            yield {key: tensor.pin_memory() for key, tensor in batch.items()} if self._pin else batch


def split_held_out(dataset: Any, wanted: int) -> tuple[RowSource, RowSource]:
    """(rows to train on, rows held out): at most ``wanted``, and at most a twentieth, are held out.

    ``dataset`` is a :class:`RowSource`, or anything with ``len`` and ``[i]``.
    """
    rows = dataset
    if not isinstance(rows, RowSource):
        check_rows(dataset)
        rows = MapRows(dataset)
    return rows, rows.hold_out(held_out_sequences(wanted, rows.sequences))


def held_out_sequences(wanted: int, rows: int) -> int:
    """How many of a dataset's ``rows`` sequences a run keeps out of training."""
    return min(wanted, rows // 20)


def check_same_data(expected: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` where ``state`` was saved while reading other data."""
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"resume: expected the data that the run started with, with {key} = {state.get(key)!r}, got {value!r}; "
                "give the same dataset, --ctx-len, --shuffle-seed and limits"
            )
