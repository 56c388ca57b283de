"""A coder of which this rank holds some latents' rows; the other ranks of its group hold the rest.

Shapes: N tokens, D width in, E width out, L latents of all ranks, K active latents.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, loss, ops
from ..coder_config import SaeConfig
from ..errors import ConfigError
from ..sae import FastSae, ForwardOutput
from .latent_peers import LatentPeers
from .row_file import receive_file, send_rows

INIT_ROWS = 2**24
"""Numbers of a whole matrix that exist at a time while it is initialised."""


class LatentSlice(FastSae):
    """The rows ``peers.begin ... peers.end - 1`` of a coder's ``encoder.weight``, ``encoder.bias`` and ``W_dec``.

    ``b_dec`` and ``W_skip`` are whole, and the same on every rank. :meth:`forward`, without gradients, and
    :meth:`save_to_disk` are done by all ranks of the group together.
    """

    def __init__(
        self, d_in: int, cfg: SaeConfig, *, peers: LatentPeers, d_out: int | None = None,
        dtype: torch.dtype = torch.float32, implementation: str = "auto",
    ):  # fmt: skip
        """The rows that ``FastSae(d_in, cfg, d_out=d_out)`` would have under the same seed."""
        nn.Module.__init__(self)
        self.cfg, self.d_in, self.peers, self._slice = cfg, d_in, peers, peers
        self.d_out = cfg.output_width(d_in, d_out)
        self.num_latents, self.implementation = peers.end - peers.begin, implementation
        self.notes: dict[str, Any] = {}
        with torch.device("meta"):
            self.encoder = nn.Linear(d_in, self.num_latents, dtype=dtype)
        self.encoder.weight = nn.Parameter(_initial_rows(cfg.latents_for(d_in), d_in, peers, dtype))
        weight = self.encoder.weight.data
        self.encoder.bias = nn.Parameter(weight.new_zeros(self.num_latents))
        decoder = weight.new_zeros(len(weight), self.d_out) if cfg.transcode else weight.clone()
        self.W_dec = nn.Parameter(decoder)
        if cfg.normalize_decoder and not cfg.transcode:
            self.set_decoder_norm_to_unit_norm()
        self.b_dec = nn.Parameter(weight.new_zeros(self.d_out))
        self.W_skip = nn.Parameter(weight.new_zeros(self.d_out, d_in)) if cfg.skip_connection else None

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> ForwardOutput:
        """Latents, reconstruction and FVU of x [..., D], the same on every rank.

        Raises :class:`ConfigError` for what only training needs (``dead_mask``).
        """
        if options.keys() - {"total_variance"}:
            raise ConfigError(f"expected x and y for a coder split over ranks, got {', '.join(options)} too")
        shape, x, y = self._rows(x, y)
        k, activation = self.cfg.k, self.cfg.activation
        acts, indices, _ = self._encode(x, ops.own_k(k, activation, self._slice))
        if activation == "topk":
            acts, indices, _ = ops.own_winners(acts, indices, k, 0, self._slice)
        offset = self.b_dec if self.W_skip is None else self.b_dec + x.to(self.dtype) @ self.W_skip.mT
        sae_out = self._slice.sum(self._decode(acts, indices)) + offset
        variance = options.get("total_variance")
        variance = loss.total_variance(y) if variance is None else variance
        acts, indices = ops.all_winners(acts, indices, k, self._slice)
        zero = sae_out.new_zeros(())
        return ForwardOutput(
            sae_out.reshape(*shape, self.d_out), acts.reshape(*shape, -1), indices.reshape(*shape, -1),
            loss.fvu(y - sae_out, variance), zero, zero,
        )  # fmt: skip

    def load_whole(self, tensors: dict[str, Tensor]) -> None:
        """Take this rank's rows of a whole coder's tensors."""
        own = slice(self._slice.begin, self._slice.end)
        self.load_state_dict({name: t[own] if name in checkpoint.ROWS else t for name, t in tensors.items()})

    def save_to_disk(self, path: Path | str) -> None:
        """The whole coder, one ordinary file, written by the group's first rank; the others send it their rows."""
        tensors = {name: t.detach() for name, t in self.state_dict().items()}
        if self._slice.rank:
            send_rows(tensors, self._slice)
            return
        widths = self.d_in, self.d_out
        checkpoint.write_coder_file(
            path, self.cfg, widths, lambda file: receive_file(file, tensors, self._slice), self.notes
        )


def _initial_rows(num_latents: int, d_in: int, peers: LatentPeers, dtype: torch.dtype) -> Tensor:
    """This rank's rows of what ``nn.Linear`` draws, block by block: the whole matrix is drawn, and never there."""
    rows, block = torch.empty(peers.end - peers.begin, d_in, dtype=dtype), max(1, INIT_ROWS // d_in)
    for begin in range(0, num_latents, block):
        drawn = torch.empty(min(block, num_latents - begin), d_in, dtype=dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        first, last = max(begin, peers.begin), min(begin + len(drawn), peers.end)
        if first < last:
            rows[first - peers.begin : last - peers.begin] = drawn[first - begin : last - begin]
    return rows
