"""Training from a cache: its tokens as rows with a cursor, and its activations in the place of a model's.

Shapes: N tokens of a batch, S tokens of a full sequence, D width.

A row is the tokens of a sequence, as numbers into the cache (``tokens`` int64 [n]); where single tokens are shuffled,
the next S of their order. Either way a batch is as many rows as training on the fly takes sequences.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ..activations import ActivationSource, Use
from ..coders import check_transcoder
from ..collation import Row
from ..config import TrainConfig
from ..devices import resolve_device
from ..errors import ConfigError, HookpointError
from ..hookpoints import Hookpoint, match_names
from ..rows import IndexedRows
from .order import TokenOrder
from .read import CachedActivations


def training_data(
    cache: CachedActivations, cfg: TrainConfig, *, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[CachedRows, CachedSource]:
    """(rows, source) for ``Trainer(cfg, rows, source)``: what stands for the dataset, and for the model.

    ``dtype`` is what activations are handed over in, by default the model's that wrote them.
    """
    return CachedRows(cache, cfg.shuffle_tokens), CachedSource(cache, cfg, resolve_device(device), dtype)


class CachedRows(IndexedRows):
    """The sequences ``start`` to ``stop`` of a cache, in order; with a ``seed``, their tokens shuffled."""

    def __init__(self, cache: CachedActivations, seed: int | None = None, start: int = 0, stop: int | None = None):
        self._cache, self._seed = cache, seed
        self._start, self._stop = start, cache.sequences if stop is None else stop
        self._shuffled: TokenOrder | None = None

    @property
    def sequences(self) -> int:
        return self._stop - self._start

    def __len__(self) -> int:
        return self.sequences if self._seed is None else -(-len(self._order) // self._cache.index.ctx_len)

    def hold_out(self, count: int) -> CachedRows:
        """As training on the fly does: the last ``count`` sequences, of a streamed dataset the first; in order."""
        if self._cache.index.data.get("streaming"):
            begin, self._start = self._start, self._start + count
        else:
            begin = self._stop = self._stop - count
        self._shuffled = None
        return CachedRows(self._cache, None, begin, begin + count)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return {"tokens": torch.cat([torch.zeros(0, dtype=torch.int64), *(row["tokens"] for row in rows)])}

    def _read(self, positions: list[int]) -> list[Row]:
        """Only which tokens they are; activations are read when a batch is trained on."""
        return [{"tokens": self._tokens(i)} for i in positions]

    @property
    def _order(self) -> TokenOrder:
        if self._shuffled is None:
            assert self._seed is not None
            self._shuffled = TokenOrder(*self._cache.tokens_of(self._start, self._stop), self._seed)
        return self._shuffled

    def _tokens(self, row: int) -> Tensor:
        if self._seed is None:
            return torch.arange(*self._cache.tokens_of(self._start + row, self._start + row + 1))
        length = self._cache.index.ctx_len
        return self._order.part(row * length, (row + 1) * length)

    def _identity(self) -> dict[str, Any]:
        files = "".join(shard.sha256 for shard in self._cache.index.shards)
        return {
            "kind": "cache", "rows": len(self), "shuffle_tokens": self._seed, "checksum": zlib.crc32(files.encode()),
        }  # fmt: skip


class CachedSource(ActivationSource):
    """A cache's activations at the hookpoints that ``cfg`` asks for, by default all of them.

    Raises :class:`HookpointError` for what is not stored, :class:`ConfigError` where other tokens were left out.
    """

    def __init__(self, cache: CachedActivations, cfg: TrainConfig, device: torch.device, dtype: torch.dtype | None):
        self._cache, self._transcode, self.device = cache, cfg.sae.transcode, device
        self.name, stored = cache.index.model, str(cache.index.data.get("dtype", cache.index.storage))
        self.dtype = getattr(torch, stored) if dtype is None else dtype
        left_out = tuple(cache.index.data.get("exclude_tokens", ()))
        if cfg.exclude_tokens and set(cfg.exclude_tokens) != set(left_out):
            raise ConfigError(
                f"exclude_tokens: expected those that the cache was written without ({_listed(left_out)}), "
                f"got {_listed(cfg.exclude_tokens)}; leave the option out, or write another cache"
            )
        self.hookpoints = {name: self._hookpoint(name) for name in _wanted(cache, cfg)}

    def count(self, rows: dict[str, Tensor]) -> int:
        return len(rows["tokens"])

    @torch.no_grad()
    def run(self, rows: dict[str, Tensor], use: Use, *, at: str, empty: bool = False) -> int:
        tokens = rows["tokens"]
        for name in self.hookpoints if len(tokens) or empty else ():
            x, y = self._cache.read(name, tokens, transcode=self._transcode)
            y_here = self._send(y)
            use(name, y_here if x is y else self._send(x), y_here)
        return len(tokens)

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True).to(self.dtype)

    def _hookpoint(self, name: str) -> Hookpoint:
        index = self._cache.index
        at = Hookpoint(name, "cached", index.inputs.get(name), index.hookpoints[name], 1)
        if self._transcode:
            if at.d_in is None:
                raise HookpointError(f"{name}: expected its inputs for a transcoder; cache them with --inputs")
            check_transcoder(at)
        return at


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _wanted(cache: CachedActivations, cfg: TrainConfig) -> list[str]:
    names = list(cache.index.hookpoints)
    if cfg.layers:
        layers = {name: name.rpartition(".")[2] for name in names}
        for layer in cfg.layers:
            if str(layer) not in layers.values():
                raise HookpointError(
                    f"expected the residual stream of layer {layer} in the cache, it holds {', '.join(names)}"
                )
        names = [name for name, layer in layers.items() if layer.isdecimal() and int(layer) in cfg.layers]
    if cfg.hookpoints:
        names = match_names(cfg.hookpoints, names, "cached activations", f"The cache holds: {', '.join(names)}")
    return names[:: cfg.layer_stride]
