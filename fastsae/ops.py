"""The one place that picks an implementation, and can say why.

``auto``: tensors on a CUDA or ROCm GPU with Triton present -> ``triton``; CPU tensors -> ``cpu``; anything
else -> ``reference``; the reason is logged once. An explicit choice never falls back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import fastsae_kernels
import torch
from fastsae_kernels import Block, Coder, EncoderOutput, GradSink, Loss, RowStep, StepOutput
from fastsae_kernels.batch_topk import part as selection_of
from fastsae_kernels.split import Peers, all_winners, own_k, own_winners
from fastsae_kernels.step import Sink
from torch import Tensor

from .errors import ConfigError

if TYPE_CHECKING:
    from fastsae_kernels.graphed_step import GraphedStep

logger = logging.getLogger("fastsae")
_logged: set[str] = set()

__all__ = [
    "Block",
    "Coder",
    "EncoderOutput",
    "GradSink",
    "Loss",
    "Peers",
    "RowStep",
    "Sink",
    "StepOutput",
    "all_winners",
    "batch_topk_encode",
    "coder_step",
    "graphed_step",
    "own_k",
    "own_winners",
    "resolve",
    "select_batch",
    "selection_of",
    "sparse_decode",
    "squared_distance",
    "topk_encode",
]

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")


def resolve(implementation: str, device: torch.device) -> str:
    """The implementation that computes on ``device``: ``triton``, ``cpu`` or ``reference``.

    Raises :class:`ConfigError` where an explicit choice cannot run there.
    """
    if implementation == "auto":
        chosen, reason = _choose(device)
        if not torch.compiler.is_compiling() and reason not in _logged:
            _logged.add(reason)
            logger.info("implementation: %s (%s)", chosen, reason)
        return chosen
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "cpu" and device.type != "cpu":
        raise ConfigError(
            f"implementation 'cpu' expects tensors on the CPU, got {device}; move them, or use 'auto' or 'triton'"
        )
    if implementation == "triton":
        if not _has_triton():
            raise ConfigError(
                "implementation 'triton' expects the triton package, which is not installed; "
                "pip install triton, or use 'auto'"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                f"implementation 'triton' expects tensors on a GPU, got {device}; "
                "move them with .to('cuda'), or use 'auto' or 'cpu'"
            )
    return implementation


def _choose(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "cpu", "tensors are on the CPU"
    if device.type == "cuda" and _has_triton():
        return "triton", "tensors are on a GPU and Triton is installed"
    if device.type == "cuda":
        return "reference", "tensors are on a GPU, but Triton is not installed: pip install triton"
    return "reference", f"no kernels for device type {device.type!r}"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def topk_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, implementation: str, **options) -> EncoderOutput:
    """:func:`fastsae_kernels.topk_encode` by the implementation that fits ``x.device``."""
    return fastsae_kernels.topk_encode(x, weight, bias, k, implementation=resolve(implementation, x.device), **options)


def batch_topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, threshold: Tensor, *, implementation: str, **options
) -> EncoderOutput:
    """Every activation above ``threshold``, or while that is unset (negative) the N·k largest of the batch.

    By the implementation that fits ``x.device``.
    """
    options["implementation"] = resolve(implementation, x.device)
    if threshold < 0:
        return fastsae_kernels.batch_topk_encode(x, weight, bias, k, **options)
    return fastsae_kernels.threshold_encode(x, weight, bias, threshold, k, **options)


def sparse_decode(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, implementation: str
) -> Tensor:
    """:func:`fastsae_kernels.sparse_decode` by the implementation that fits ``W_dec.device``."""
    return fastsae_kernels.sparse_decode(
        top_acts, top_indices, W_dec, b_dec, implementation=resolve(implementation, W_dec.device)
    )


def coder_step(
    x: Tensor, target: Tensor, coder: Coder, loss: Loss, sink: Sink, *, implementation: str,
    graphed: GraphedStep | None = None, **options,
) -> StepOutput:  # fmt: skip
    """:func:`fastsae_kernels.coder_step`, or what replays it, by the implementation that fits ``x.device``."""
    step = fastsae_kernels.coder_step if graphed is None else graphed
    return step(x, target, coder, loss, sink, implementation=resolve(implementation, x.device), **options)


def graphed_step() -> GraphedStep:
    """:func:`coder_step` of one coder as a CUDA graph, where it can be one; needs Triton."""
    from fastsae_kernels.graphed_step import GraphedStep

    return GraphedStep()


def select_batch(x: Tensor, coder: Coder, k: int, *, implementation: str, **options) -> list[Block]:
    """:func:`fastsae_kernels.select_batch` by the implementation that fits ``x.device``."""
    return fastsae_kernels.select_batch(x, coder, k, implementation=resolve(implementation, x.device), **options)


def squared_distance(x: Tensor, shift: Tensor) -> Tensor:  # [N, D], [D] -> []
    """``Σ ‖x_n - shift‖²`` in shift's precision, float32 or float64.

    Of plain 16-bit or float32 tensors on a GPU with Triton by a kernel, which makes no wide copy; else by torch, which
    differentiates and traces it, too.
    """
    plain = type(x) is Tensor and not x.requires_grad and not torch.compiler.is_compiling()  # no fake one either
    if plain and x.is_cuda and x.dtype != torch.float64 and _has_triton():
        from fastsae_kernels.center import squared_distance

        return squared_distance(x, shift)
    return (x.to(shift.dtype) - shift).square().sum()
