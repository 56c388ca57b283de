"""Selections of another size for every token: the N·k largest activations of a batch, or all above a threshold.

Shapes: N tokens, D width, L latents; a block has R tokens with K slots each.

Every token shows its 2k largest activations first. The cut is the N·k-th largest of all that is shown; a token whose
smallest shown activation reaches it may hide more, and is encoded again, twice as wide, until no token does. What is
hidden then lies below the cut, so the selection is that of all N·L activations. A token that is widened from K slots
shows K activations above the cut, of which there are at most N·k (but for equal ones), so all blocks together hold at
most 4·N·k slots, whatever a few tokens do. Each round ends with one wait of the host for the GPU: whether any token is
left to widen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_select import fill_zeros

Encode = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``encode(x [R, D], K) -> activations [R, K], indices [R, K]`` under TopK's contract."""


class Block(NamedTuple):
    """Tokens that show equally many activations, larger first; 0 where one is not selected."""

    tokens: Tensor | None  # [R] int64, ascending; None: all, in order
    acts: Tensor  # [R, K]
    indices: Tensor  # [R, K] int64


def batch_topk(x: Tensor, k: int, num_latents: int, encode: Encode) -> list[Block]:  # [N, D]
    """The N·k largest positive activations of the batch (Bussmann et al. 2024, arXiv 2412.06410).

    Of equal activations those of smaller tokens, then of smaller latents, come first. Blocks ascend in width; each
    token is in one of them.
    """
    kept = len(x) * k
    blocks, cut, surplus = _shown(x, k, num_latents, encode, lambda blocks: _cut(blocks, kept))
    last_tie = _last_tie(blocks, cut, surplus, num_latents) if surplus > 0 else None

    def selected(block: Block) -> Block:
        out = block.acts < cut
        if last_tie is not None:
            out |= (block.acts == cut) & (_order(block, num_latents) > last_tie)
        return block._replace(acts=block.acts.masked_fill(out, 0.0))

    return [selected(block) for block in blocks]


def above_threshold(x: Tensor, threshold: Tensor, k: int, num_latents: int, encode: Encode) -> list[Block]:
    """Every activation above ``threshold`` (a scalar, not negative), looked for among 2k per token first."""

    def cut_of(blocks: list[Block]) -> tuple[Tensor, Tensor]:
        least = torch.nextafter(threshold.to(blocks[0].acts), threshold.new_tensor(torch.inf).to(blocks[0].acts))
        return least, torch.zeros_like(least)

    blocks, cut, _ = _shown(x, k, num_latents, encode, cut_of)
    return [block._replace(acts=block.acts.masked_fill(block.acts < cut, 0.0)) for block in blocks]


def rectangle(blocks: list[Block], k: int, num_latents: int) -> tuple[Tensor, Tensor]:
    """The blocks as [N, K] activations and indices: K is 2k, doubled until every token fits, at most L.

    Larger activations first; rows are filled up with zeros at the smallest indices that are left.
    """
    N = sum(len(block.acts) for block in blocks)
    most = max((int((block.acts != 0).sum(1).max()) for block in blocks if len(block.acts)), default=0)
    width = slots(most, k, num_latents)
    acts = blocks[0].acts.new_zeros(N, width)
    indices = torch.zeros_like(acts, dtype=torch.int64)
    for tokens, block_acts, block_indices in blocks:
        rows = slice(None) if tokens is None else tokens
        shown = min(width, block_acts.shape[1])
        acts[rows, :shown], indices[rows, :shown] = block_acts[:, :shown], block_indices[:, :shown]
    return fill_zeros(acts, indices)


def slots(most: int, k: int, num_latents: int) -> int:
    """2k, doubled until it holds ``most``, at most ``num_latents``: few different widths, so few compilations."""
    width = 2 * k
    while width < most:
        width *= 2
    return min(width, num_latents)


def part(blocks: list[Block], begin: int, end: int) -> list[Block]:
    """The selection of the tokens ``begin ... end - 1``, which are counted from 0 in it."""
    if blocks[0].tokens is None:
        return [Block(None, blocks[0].acts[begin:end], blocks[0].indices[begin:end])]
    parts = []
    for tokens, acts, indices in blocks:
        assert tokens is not None
        inside = ((tokens >= begin) & (tokens < end)).nonzero()[:, 0]
        parts.append(Block(tokens[inside] - begin, acts[inside], indices[inside]))
    return [block for block in parts if len(block.acts)]


def rows_of_one_width(blocks: list[Block]) -> Block:
    """The blocks as rows of the first one's width: a wide token becomes several rows, each with its token."""
    if blocks[0].tokens is None:
        return blocks[0]
    width = blocks[0].acts.shape[1]
    rows: list[Block] = []
    for tokens, acts, indices in blocks:
        assert tokens is not None
        missing = -acts.shape[1] % width
        acts, indices = (torch.nn.functional.pad(t, (0, missing)) for t in (acts, indices))
        rows.append(
            Block(tokens.repeat_interleave(acts.shape[1] // width), acts.view(-1, width), indices.view(-1, width))
        )
    return Block(*(torch.cat(parts) for parts in zip(*rows, strict=True)))  # type: ignore[arg-type]


def _shown(
    x: Tensor, k: int, num_latents: int, encode: Encode, cut_of: Callable[[list[Block]], tuple[Tensor, Tensor]]
) -> tuple[list[Block], Tensor, int]:
    """(blocks that hide nothing that reaches the cut, the cut, how many activations too many reach it)."""
    width = min(2 * k, num_latents)
    blocks = [Block(None, *encode(x, width))]
    if not len(x):
        return blocks, x.new_zeros(()), 0
    while True:
        cut, surplus = cut_of(blocks)
        least = blocks[-1].acts[:, -1]
        hiding = (least >= cut) & (least > 0) if width < num_latents else torch.zeros_like(least, dtype=torch.bool)
        count, too_many = torch.stack([hiding.sum(), surplus.long()]).tolist()  # the host waits
        if not count:
            return blocks, cut, too_many
        width = min(2 * width, num_latents)
        blocks[-1:] = _widened(blocks[-1], hiding, x, width, encode)


def _widened(block: Block, hiding: Tensor, x: Tensor, width: int, encode: Encode) -> list[Block]:
    """The tokens of ``block`` that hide nothing, as they are, and the others ``width`` wide."""
    again, rest = hiding.nonzero()[:, 0], (~hiding).nonzero()[:, 0]
    tokens = torch.arange(len(x), device=x.device) if block.tokens is None else block.tokens
    wide = Block(tokens[again], *encode(x[tokens[again]], width))
    return [Block(tokens[rest], block.acts[rest], block.indices[rest]), wide] if len(rest) else [wide]


def _cut(blocks: list[Block], kept: int) -> tuple[Tensor, Tensor]:
    """(the ``kept``-th largest activation, how many more than ``kept`` reach it), scalars; without a wait."""
    shown = torch.cat([block.acts.flatten() for block in blocks])
    cut = shown.topk(kept, sorted=False).values.min()
    return cut, torch.where(cut > 0, (shown >= cut).sum() - kept, 0)


def _last_tie(blocks: list[Block], cut: Tensor, surplus: int, num_latents: int) -> Tensor:
    """The order of the last activation, of those that equal the cut, that is selected."""
    tied = torch.cat([_order(block, num_latents)[block.acts == cut] for block in blocks])
    return tied.sort().values[len(tied) - surplus - 1]


def _order(block: Block, num_latents: int) -> Tensor:  # int64 [R, K]
    """By token, then by latent."""
    tokens = block.tokens
    if tokens is None:
        tokens = torch.arange(len(block.acts), device=block.acts.device)
    return tokens[:, None] * num_latents + block.indices
