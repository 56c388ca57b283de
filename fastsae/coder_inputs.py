"""What a coder's encode, decode and forward take, checked by shape and dtype, without a look at the numbers.

Shapes: ``...`` any leading dimensions, N rows, D width, E output width, K active latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError


def as_rows(x: Tensor, y: Tensor | None, d_in: int, d_out: int, at: str) -> tuple[torch.Size, Tensor, Tensor]:
    """(leading dimensions, x [N, D], y [N, E]) of x [..., D] and y [..., E], by default x itself.

    ``at``: the hookpoint that the coder was trained on, for messages; "" is unknown.
    """
    check_activations("x", x, d_in, at)
    if y is None and d_out != d_in:
        raise ConfigError(
            f"expected y of width {d_out} beside x of width {d_in} for this transcoder, got none; "
            "give it what the module made of x"
        )
    y = x if y is None else y
    check_activations("y", y, d_out, at)
    if y.shape[:-1] != x.shape[:-1]:
        raise ConfigError(f"expected as many rows of y as of x, {list(x.shape)}, got {list(y.shape)}")
    return x.shape[:-1], x.reshape(-1, d_in), y.reshape(-1, d_out)


def check_activations(name: str, tensor: Tensor, width: int, at: str) -> None:
    """Raise :class:`ConfigError` unless ``tensor`` is floating-point [..., width]."""
    coder = f"this coder ({at})" if at else "this coder"
    if tensor.ndim == 0 or tensor.shape[-1] != width:
        raise ConfigError(
            f"expected {name} of width {width} for {coder}, got shape {list(tensor.shape)}; "
            "give it the activations of the hookpoint it was trained on"
        )
    if not tensor.is_floating_point():
        raise ConfigError(f"expected {name} in a floating-point dtype for {coder}, got {tensor.dtype}")


def check_active(top_acts: Tensor, top_indices: Tensor) -> None:
    """Raise :class:`ConfigError` unless both are [..., K], activations and the integers of their latents."""
    integers = not (top_indices.is_floating_point() or top_indices.is_complex() or top_indices.dtype == torch.bool)
    if top_acts.ndim == 0 or top_acts.shape != top_indices.shape or not integers:
        raise ConfigError(
            "expected top_acts [..., K] and as many integers in top_indices, got "
            f"{list(top_acts.shape)} and {list(top_indices.shape)} {top_indices.dtype}"
        )
