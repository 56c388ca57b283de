"""The differentiable encoders whose number of active latents varies by token: BatchTopK, and its threshold.

Shapes: N tokens, D width, L latents, K slots per token: 2k, doubled until every token's activations fit, at most L.

How many slots a batch needs is known when it has been looked at: the host waits for the GPU, so
``torch.compile(fullgraph=True)`` and FakeTensor cannot trace these two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .autograd import keep_selection, selection_grads
from .batch_topk import Block, Encode, above_threshold, batch_topk, rectangle
from .operators import backend
from .reference import EncoderOutput


class VaryingEncode(torch.autograd.Function):
    """``choose``'s selection of ``ReLU((x - b_dec) weightᵀ + bias)``, differentiable in x, weight, bias and b_dec.

    The selection is a constant; an activation of 0 gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, b_dec, choose, k, impl):
        centered = reference.center(x, b_dec)

        def encode(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
            return backend(impl).encode(rows, weight, bias, width, "topk", None)

        acts, indices = rectangle(choose(centered, encode), k, len(weight))
        return keep_selection(ctx, centered, weight, bias, b_dec, acts, indices, impl)

    @staticmethod
    def backward(ctx, d_acts, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *selection_grads(ctx, d_acts), None, None, None


def batch_topk_encode(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    k: int,
    *,
    b_dec: Tensor | None = None,  # [D]
    implementation: str = "triton",
) -> EncoderOutput:
    """The N·k largest of ``ReLU((x - b_dec) weightᵀ + bias)``, exact.

    BatchTopK (Bussmann et al. 2024, arXiv 2412.06410). Activations and indices [N, K], larger first; zeros at the
    smallest indices that are left behind them. Of equal activations those of smaller tokens, then of smaller latents,
    are taken. Raises ``ValueError`` where shapes or k do not fit.
    """
    _check("batch_topk_encode", x, weight, bias, k, b_dec)
    if implementation == "reference":
        return reference.batch_topk_encode(x, weight, bias, k, b_dec=b_dec)

    def choose(centered: Tensor, encode: Encode) -> list[Block]:
        return batch_topk(centered, k, len(weight), encode)

    return _encode(x, weight, bias, b_dec, choose, k, implementation)


def threshold_encode(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [L, D]
    bias: Tensor,  # [L]
    threshold: Tensor,  # []: not negative
    k: int,
    *,
    b_dec: Tensor | None = None,  # [D]
    implementation: str = "triton",
) -> EncoderOutput:
    """Every activation above ``threshold``: BatchTopK at inference, where tokens do not depend on each other.

    Activations and indices as of :func:`batch_topk_encode`; ``k`` is how many a token is expected to have, and changes
    nothing but the number of slots. Raises ``ValueError`` where shapes or k do not fit.
    """
    _check("threshold_encode", x, weight, bias, k, b_dec)
    if implementation == "reference":
        return reference.threshold_encode(x, weight, bias, threshold, k, b_dec=b_dec)

    def choose(centered: Tensor, encode: Encode) -> list[Block]:
        return above_threshold(centered, threshold, k, len(weight), encode)

    return _encode(x, weight, bias, b_dec, choose, k, implementation)


def _encode(
    x: Tensor, weight: Tensor, bias: Tensor, b_dec: Tensor | None,
    choose: Callable[[Tensor, Encode], list[Block]], k: int, implementation: str,
) -> EncoderOutput:  # fmt: skip
    acts, indices = VaryingEncode.apply(x, weight, bias, b_dec, choose, k, implementation)
    return EncoderOutput(acts, indices, None)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor, k: int, b_dec: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: expected x [N, D], weight [L, D], bias [L], "
            f"got {list(x.shape)}, {list(weight.shape)}, {list(bias.shape)}"
        )
    if b_dec is not None and b_dec.shape != x.shape[1:]:
        raise ValueError(f"{name}: expected b_dec [{x.shape[1]}], got {list(b_dec.shape)}")
    if not 1 <= k <= len(weight):
        raise ValueError(f"{name}: expected 1 <= k <= number of latents ({len(weight)}), got k = {k}")
