"""What a training step is made of: the coder, a batch at its selection, and where gradient rows go.

Shapes: N tokens, D width in, E width out (E = D for an autoencoder), L latents, K slots, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .auxk import AuxGrads
from .by_latent import LatentIndex
from .rules import Rows, Rule, update_rows


class Coder(NamedTuple):
    """A coder's tensors."""

    weight: Tensor  # [L, D]
    bias: Tensor  # [L]
    W_dec: Tensor  # [L, E]
    b_dec: Tensor  # [E]
    W_skip: Tensor | None = None  # [E, D]: out += x W_skipᵀ
    centered: bool = True  # encodes x - b_dec; else x itself, as transcoders do
    low_weight: Tensor | None = None  # [L, D]: weight in x's dtype, where the optimizer keeps such a copy
    low_W_dec: Tensor | None = None  # [L, E]

    @property
    def used_weight(self) -> Tensor:
        """The encoder in the precision that the step computes in: its narrow copy where there is one."""
        return self.weight if self.low_weight is None else self.low_weight

    @property
    def used_W_dec(self) -> Tensor:
        """The same of the decoder."""
        return self.W_dec if self.low_W_dec is None else self.low_W_dec

    def part(self, begin: int, end: int) -> Coder:
        """The latents ``begin ... end - 1`` alone; the tensors are shared."""
        matrices = ("weight", "bias", "W_dec", "low_weight", "low_W_dec")
        return self._replace(**{n: t[begin:end] for n in matrices if (t := getattr(self, n)) is not None})


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch at its selection, ready for the backward pass."""

    index: LatentIndex  # of top_indices, slots without activation left out
    x: Tensor  # [N, D], what the encoder saw
    top_acts: Tensor  # [N, K]
    top_indices: Tensor  # [N, K]
    residual: Tensor  # [N, E]; with first_k [2, N, E]: for the slots below first_k, and for the rest
    scale: Tensor  # []: ∂loss/∂x̂ is scale · residual
    first_k: int  # 0: none


class RowGrads(NamedTuple):
    """Gradients of the latents ``begin ... end - 1``, R of them."""

    begin: int
    end: int
    dW_enc: Tensor  # [R, D]
    db_enc: Tensor  # [R]
    dW_dec: Tensor  # [R, E]


class Sink(Protocol):
    """Where the two matrices' gradient rows go."""

    begun: bool
    """Rows were taken: what failed since then cannot be tried again."""

    def rows(self, begin: int, end: int, dW_enc: Tensor, dW_dec: Tensor) -> None:
        """Take the gradients of the latents ``begin ... end - 1``; may overwrite them. Called once per latent."""
        ...

    def part(self, begin: int, end: int) -> Sink:
        """Where the rows of the latents ``begin ... end - 1`` alone go, counted from 0."""
        ...


@dataclass
class GradSink:
    """Add gradient rows to dense gradients."""

    dW_enc: Tensor  # [L, D]
    dW_dec: Tensor  # [L, E]
    begun: bool = False

    def rows(self, begin: int, end: int, dW_enc: Tensor, dW_dec: Tensor) -> None:
        self.begun = True
        self.dW_enc[begin:end] += dW_enc
        self.dW_dec[begin:end] += dW_dec

    def part(self, begin: int, end: int) -> GradSink:
        return GradSink(self.dW_enc[begin:end], self.dW_dec[begin:end])


@dataclass
class RowStep:
    """An optimizer's step number ``step`` (from 1) of the encoder's and the decoder's rows."""

    rule: Rule
    lr: float
    step: int
    encoder: Rows
    decoder: Rows
    begun: bool = False
    scalars: Tensor | None = None
    """[6] float32 on the GPU: what ``row_update.scalars`` gives, for a recorded step, whose numbers change."""

    def rows(self, begin: int, end: int, dW_enc: Tensor, dW_dec: Tensor) -> None:
        self.begun = True
        for matrix, grad in ((self.encoder, dW_enc), (self.decoder, dW_dec)):
            update_rows(self.rule, matrix.part(begin, end), grad, lr=self.lr, step=self.step)

    def part(self, begin: int, end: int) -> RowStep:
        return replace(self, begun=False, encoder=self.encoder.part(begin, end), decoder=self.decoder.part(begin, end))


def deliver(blocks: Iterable[RowGrads], coder: Coder, aux: AuxGrads | None, sink: Sink) -> tuple[Tensor, Tensor]:
    """Hand the blocks, AuxK's rows added, to ``sink``; returns d_bias [L] and ``W_encᵀ d_bias`` [D].

    The product is taken block by block with the weights as they were: ``sink`` may change them.
    """
    biases = []
    through = torch.zeros_like(coder.b_dec, dtype=torch.promote_types(coder.b_dec.dtype, torch.float32))
    for block in blocks:
        if aux is not None:
            _add_rows(block, aux, whole=block.end - block.begin == len(coder.bias))
        biases.append(block.db_enc)
        if coder.centered:
            through += block.db_enc @ coder.weight[block.begin : block.end].to(block.db_enc.dtype)
        sink.rows(block.begin, block.end, block.dW_enc, block.dW_dec)
        del block  # else it would be there beside the next one
    return torch.cat(biases), through


def _add_rows(block: RowGrads, aux: AuxGrads, *, whole: bool) -> None:
    """Add AuxK's gradients of the block's dead latents; a block of all latents needs no look at which they are."""
    inside = slice(None)
    if not whole:
        inside = slice(*torch.searchsorted(aux.dead, aux.dead.new_tensor([block.begin, block.end])).tolist())
    rows = aux.dead[inside] - block.begin
    for total, part in ((block.dW_enc, aux.dW_enc), (block.db_enc, aux.db_enc), (block.dW_dec, aux.dW_dec)):
        total.index_add_(0, rows, part[inside])
