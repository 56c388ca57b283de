"""Rows of a streamed dataset: shuffled through a buffer, up to a limit, with a cursor that resumes exactly.

``datasets`` loses the content of its own shuffle buffer on resume, so the buffer is kept here and its rows are part of
the state: S tokens each, 1024 rows by default (16 MB at S = 2048).
"""

from __future__ import annotations

import logging
import lzma
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from datasets import IterableDataset
from datasets.exceptions import DatasetGenerationError

from .collation import Row, collate
from .errors import ArtifactError, first_line
from .rows import MapRows, RowSource, check_same_data

logger = logging.getLogger("fastsae")

UNREADABLE = (ValueError, DatasetGenerationError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged or vanished file raises, somewhere below."""


class TokenStream(RowSource):
    """At most ``rows`` rows (``input_ids``, equally long) of a streamed ``dataset``.

    Rows pass through a buffer of ``buffer`` rows, and leave it in an order that follows from ``seed`` alone;
    1 keeps the dataset's order. Reading starts at the first ``take``.
    """

    def __init__(self, dataset: IterableDataset, rows: int, *, buffer: int = 1, seed: int = 0):
        self._dataset, self._rows, self._size, self._seed = dataset, rows, buffer, seed
        self._start = dataset.state_dict()
        self._held: list[Row] = []
        self._drawn = 0  # in all, those held out included
        self._held_out = 0
        self._rows_ahead: Iterator[Row] | None = None
        self._at_end = self._said_end = False

    def __len__(self) -> int:
        return self._rows - self._held_out

    def take(self, count: int) -> list[Row]:
        """The next rows; a note says so where the stream ends before its limit."""
        rows = []
        while len(rows) < count and self._drawn < self._rows and self._fill():
            rows.append(self._draw())
        if len(rows) < count and self._drawn < self._rows and not self._said_end:
            logger.warning("the dataset ended after %d of %d sequences; the run ends here", self._drawn, self._rows)
            self._said_end = True
        return rows

    def hold_out(self, count: int) -> MapRows:
        """The first ``count`` rows, kept in memory."""
        held_out = self.take(count)
        self._held_out += len(held_out)
        return MapRows(held_out)

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Of numbers, texts and dicts; and the rows in the buffer as ``input_ids [rows, S]``."""
        drawn, held = self._drawn, list(self._held)
        data = self._dataset.state_dict() if drawn else self._start
        return lambda: {
            **self._identity(),
            "drawn": drawn,
            "data": data,
            "buffer": collate(held) if held else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_data(self._identity(), state)
        self._dataset.load_state_dict(state["data"])
        buffer = state["buffer"]
        held = len(buffer["input_ids"]) if buffer else 0
        self._held = [{key: tensor[i] for key, tensor in buffer.items()} for i in range(held)]
        self._drawn = int(state["drawn"])
        self._rows_ahead, self._at_end = None, False

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "stream", "rows": self._rows, "held_out": self._held_out, "shuffle_buffer": self._size,
            "shuffle_seed": self._seed,
        }  # fmt: skip

    def _fill(self) -> bool:
        """Read until the buffer is full or the data end; whether a row is there."""
        if self._rows_ahead is None:
            self._rows_ahead = iter(self._dataset)
        while len(self._held) < self._size and not self._at_end:
            row = readable(lambda rows=self._rows_ahead: next(rows, None))
            if row is None:
                self._at_end = True
            else:
                self._held.append(row)
        return bool(self._held)

    def _draw(self) -> Row:
        """One row of the buffer, by a number that depends on the seed and the count only: no generator to save."""
        i = random.Random(f"{self._seed}-{self._drawn}").randrange(len(self._held))
        self._held[i], self._held[-1] = self._held[-1], self._held[i]
        self._drawn += 1
        return self._held.pop()


def first_row(dataset: IterableDataset) -> Row:
    """The first row, which stays there; raises :class:`ArtifactError` for an empty dataset."""
    row = readable(lambda: next(iter(dataset.take(1)), None))  # a stream of its own: the cursor stays
    if row is None:
        raise ArtifactError("dataset: expected at least one row, got an empty dataset")
    return row


def readable(read: Callable[[], Any]) -> Any:
    """``read()``; what a damaged dataset raises becomes an :class:`ArtifactError` of one line."""
    try:
        return read()
    except ArtifactError:
        raise
    except UNREADABLE as error:
        raise ArtifactError(
            f"dataset: could not read on: {reason(error)}; text files must be UTF-8, and hub datasets within reach"
        ) from None


def reason(error: Exception) -> str:
    """What was wrong with the file: ``datasets`` raises an error of its own around that."""
    return first_line(error.__cause__ or error)
