"""Making a coder fit a format: exact rewrites, and the cuts that lose something and say so.

Each returns a coder, and the cuts append what was lost, as a clause, to the list they are given.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ..errors import CheckpointError
from .coder import Coder


def with_centering(coder: Coder, centered: bool, lost: list[str]) -> Coder:
    """The same function with or without ``x - b_dec``: the difference, W_enc b_dec, moves into the encoder's bias."""
    if coder.centered == centered:
        return coder
    if coder.d_in != coder.d_out:
        impossible(f"b_dec of width {coder.d_out} cannot be subtracted from inputs of width {coder.d_in}")
    if coder.b_enc.dtype in (torch.bfloat16, torch.float16):
        lost.append(f"moving W_enc b_dec into a {str(coder.b_enc.dtype).removeprefix('torch.')} bias rounds it")
    shift = coder.W_enc.double() @ coder.b_dec.double()
    bias = coder.b_enc.double() + (shift if centered else -shift)
    return coder.replace(b_enc=bias.to(coder.b_enc.dtype), centered=centered)


def without_skip(coder: Coder, format: str, lost: list[str]) -> Coder:
    if coder.W_skip is None:
        return coder
    lost.append(f"{format} has no skip connection for this kind of coder: W_skip is dropped")
    return coder.replace(W_skip=None)


def without_layer_norm(coder: Coder, format: str, lost: list[str]) -> Coder:
    if not coder.layer_norm:
        return coder
    lost.append(f"{format} has no layer norm of the input: feed it normalised activations yourself")
    return coder.replace(layer_norm=False)


def as_topk(coder: Coder, format: str, lost: list[str]) -> Coder:
    """A TopK coder of jumprelu, relu or groupmax; possible only where k is known."""
    if coder.activation == "topk":
        return coder
    if coder.k is None:
        impossible(f"{format} holds TopK coders only, and no k is known for this {coder.activation} coder")
    lost.append(f"{format} has no {coder.activation}: it is written as TopK with k = {coder.k}")
    return coder.replace(activation="topk", threshold=None)


def without_groupmax(coder: Coder, format: str, lost: list[str]) -> Coder:
    return as_topk(coder, format, lost) if coder.activation == "groupmax" else coder


def impossible(reason: str) -> NoReturn:
    raise CheckpointError(f"cannot be converted: {reason}")
