"""Reading cached activations, memory-mapped: in the order of writing, or with tokens shuffled.

Shapes: N tokens of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError
from ..integrity import sha256
from .index import COUNTS, INPUT, OUTPUT, read_index
from .order import BLOCK, POOL, TokenOrder

Pairs = dict[str, tuple[Tensor, Tensor]]
"""By hookpoint: what a coder encodes and what it predicts, [N, D] each, as stored; for an autoencoder both are the
module's output, one tensor."""


class CachedActivations:
    """The activations in a folder that ``fastsae cache`` wrote; nothing is read before it is asked for.

    Raises :class:`ArtifactError` for a folder without an index, an unfinished cache, and files of another size than
    the index says; :meth:`verify` compares their hashes.
    """

    def __init__(self, folder: Path | str):
        self.folder, self.index = Path(folder), read_index(folder)
        index = self.index
        if index.done < index.sequences:
            raise ArtifactError(
                f"activations: expected {index.sequences} sequences in {folder}, got {index.done}; finish it with the "
                "same fastsae cache command"
            )
        for shard in index.shards:
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.bytes:
                raise ArtifactError(
                    f"{path}: expected {shard.bytes} bytes, got {size}; remove the cache and write it anew"
                )
        self._tensors = [self._open(shard.file) for shard in index.shards]
        counts = [tensors[COUNTS].long() for tensors in self._tensors]
        self._ends = torch.cat(counts).cumsum(0)  # [sequences]: tokens up to the end of each
        self._shard_ends = torch.tensor([len(tensors[self._names()[0]]) for tensors in self._tensors]).cumsum(0)

    @property
    def hookpoints(self) -> dict[str, int]:
        """Output width by hookpoint."""
        return dict(self.index.hookpoints)

    @property
    def sequences(self) -> int:
        return self.index.sequences

    @property
    def tokens(self) -> int:
        return int(self._ends[-1])

    def batches(
        self, sequences: int, *, start: int = 0, stop: int | None = None, transcode: bool = False,
        hookpoints: Sequence[str] | None = None,
    ) -> Iterator[Pairs]:  # fmt: skip
        """Batches of the tokens of ``sequences`` sequences, from the sequence ``start`` to ``stop``, in order.

        These are the batches that training on the fly sees of the same data: the same tokens in the same order.
        """
        stop = self.sequences if stop is None else stop
        for first in range(start, stop, sequences):
            tokens = torch.arange(*self.tokens_of(first, min(first + sequences, stop)))
            yield self._pairs(tokens, transcode, hookpoints)

    def shuffled(
        self, tokens: int, *, seed: int, start: int = 0, stop: int | None = None, transcode: bool = False,
        hookpoints: Sequence[str] | None = None, block: int = BLOCK, pool: int = POOL,
    ) -> Iterator[Pairs]:  # fmt: skip
        """Batches of ``tokens`` tokens of the sequences ``start`` to ``stop``, every token once; the last is smaller.

        The order is :class:`.order.TokenOrder`'s: near to a full shuffle, with reads that a disk can follow.
        """
        begin, end = self.tokens_of(start, self.sequences if stop is None else stop)
        order = TokenOrder(begin, end, seed, block, pool)
        for first in range(0, len(order), tokens):
            yield self._pairs(order.part(first, first + tokens), transcode, hookpoints)

    def verify(self) -> Iterator[str]:
        """Read every file and compare its hash, yielding its name; raises :class:`ArtifactError` at a difference."""
        for shard in self.index.shards:
            if sha256(self.folder / shard.file) != shard.sha256:
                raise ArtifactError(
                    f"{self.folder / shard.file}: its content is not what was written (SHA-256 differs); "
                    "remove the cache and write it anew"
                )
            yield shard.file

    def _pairs(
        self, rows: Tensor, transcode: bool, hookpoints: Sequence[str] | None
    ) -> Pairs:  # int64 [N], over the whole cache
        names = self.index.hookpoints if hookpoints is None else hookpoints
        return {name: self.read(name, rows, transcode=transcode) for name in names}

    def read(self, hookpoint: str, tokens: Tensor, *, transcode: bool = False) -> tuple[Tensor, Tensor]:
        """What a coder at ``hookpoint`` encodes and predicts of ``tokens`` (int64 [N], in the whole cache)."""
        y = self._gather(f"{hookpoint}/{OUTPUT}", tokens)
        if transcode and hookpoint not in self.index.inputs:
            raise ArtifactError(
                f"activations: expected inputs of {hookpoint} for a transcoder; cache them with --inputs"
            )
        return (self._gather(f"{hookpoint}/{INPUT}", tokens) if transcode else y), y

    def tokens_of(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens of the sequences ``start`` to ``stop``, from the first to one behind the last."""
        return self._token(start), self._token(stop)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        shards = torch.searchsorted(self._shard_ends, rows, right=True)
        out = torch.empty(len(rows), self._tensors[0][name].shape[1], dtype=self.index.dtype)
        for i in shards.unique().tolist():
            mine = shards == i
            first = int(self._shard_ends[i - 1]) if i else 0
            out[mine] = self._tensors[i][name][rows[mine] - first]
        return out

    def _token(self, sequence: int) -> int:
        """The first token of a sequence; of one behind the last, the number of tokens."""
        return int(self._ends[sequence - 1]) if sequence else 0

    def _names(self) -> list[str]:
        return [f"{name}/{OUTPUT}" for name in self.index.hookpoints]

    def _open(self, file: str) -> dict[str, Tensor]:
        """The tensors of a shard; safetensors maps them into memory, and pages are read when touched."""
        try:
            with safe_open(self.folder / file, framework="pt", device="cpu") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.folder / file}: not a readable safetensors file ({error})") from None
