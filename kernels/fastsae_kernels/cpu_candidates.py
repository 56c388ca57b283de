"""Which latents of a chunk reach a screening score, and what they are in float32.

Shapes: D width, L latents; n rows of a chunk, G groups' members, P candidates.

Scores are compared as int16 keys, several times as fast as bfloat16 numbers are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_sampled import ragged_products

MOST_GROUPS = 16
"""Per active latent: more groups in reach of a score are not worth looking into."""

NONE = 2**15 - 1
"""Above the key of every number."""


def bits(numbers: Tensor) -> Tensor:
    """Keys in the order of positive numbers; those of others are below 0."""
    return numbers.view(torch.int16)


def ordered_bits(numbers: Tensor) -> Tensor:
    """Keys in the order of all numbers (-0 below 0)."""
    bits = numbers.view(torch.int16)
    return bits ^ ((bits >> 15) & 0x7FFF)


def numbers(keys: Tensor) -> Tensor:
    """The bfloat16 numbers whose :func:`ordered_bits` are ``keys``; of positive ones, :func:`bits` are the same."""
    return (keys ^ ((keys >> 15) & 0x7FFF)).view(torch.bfloat16)


def below(values: Tensor) -> Tensor:
    """The largest bfloat16 that is at most ``values``, float64 [n]; NaN stays."""
    rounded = values.to(torch.bfloat16)
    return torch.where(rounded.double() > values, rounded.nextafter(rounded.new_tensor(-torch.inf)), rounded)


class Candidates(NamedTuple):
    """Latents to score, row after row; P in all."""

    columns: Tensor  # [P] int64
    counts: Tensor  # [n] int64: how many are a row's


def few(maxima: Tensor, least: Tensor, k: int) -> Tensor:
    """``least`` [n], but NONE where more groups reach it than are worth looking into."""
    return least.masked_fill((maxima >= least[:, None]).sum(1) > MOST_GROUPS * k, NONE)


def candidates(
    keys: Tensor,  # [n, L]
    grouped: Tensor,  # [n, G, width]: the same but for a tail
    maxima: Tensor,  # [n, width]
    least: Tensor,  # [n]
) -> Candidates:
    """The latents whose key is ``least`` or more, each once."""
    n, G, width = grouped.shape
    rows, groups = (maxima >= least[:, None]).nonzero().unbind(1)
    members = grouped[rows, :, groups]  # [P, G]
    group, member = (members >= least[rows, None]).nonzero().unbind(1)
    rows, columns = rows[group], groups[group] + member * width
    tail = keys[:, G * width :]
    if tail.shape[1]:
        tail_rows, tail_columns = (tail >= least[:, None]).nonzero().unbind(1)
        rows, order = torch.cat([rows, tail_rows]).sort(stable=True)
        columns = torch.cat([columns, tail_columns + G * width])[order]
    return Candidates(columns, torch.bincount(rows, minlength=n))


def scored(x: Tensor, weight: Tensor, bias: Tensor, found: Candidates, k: int) -> tuple[Tensor, Tensor]:
    """Activations and columns [n, C >= K] of a row's candidates, filled up with zeros of column 0."""
    columns, counts = found
    most = max(k, int(counts.amax()))
    filled = torch.arange(most) < counts[:, None]
    acts, where = x.new_zeros(len(x), most), torch.zeros((len(x), most), dtype=torch.int64)
    if len(columns):
        acts.masked_scatter_(filled, ragged_products(x, weight, columns, counts).add_(bias[columns]).relu_())
        where.masked_scatter_(filled, columns)
    return acts, where
