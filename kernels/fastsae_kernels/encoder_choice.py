"""Which of the two exact encoders serves a shape: the fused kernel, or the vendor's product and a select.

Shapes: D width, L latents, K active latents. Both give the same answer; only time and memory differ.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from . import configs, gpu


@dataclass(frozen=True)
class Machine:
    """What the choice between the encoders assumes of a GPU; sm_90 measured on an H200, the others model figures."""

    tflops: float
    """Dense 16-bit matrix peak."""

    gigabytes: float
    """Memory bandwidth per second."""

    fused_efficiency: float
    """Share of the peak that the fused kernel's matrix loop reaches."""

    vendor_efficiency: float
    """Share of the peak that the vendor's matrix product reaches."""


_MACHINES = {
    "sm_80": Machine(312, 1900, 0.72, 0.82),
    "sm_89": Machine(165, 1000, 0.80, 0.85),
    "sm_90": Machine(770, 4100, 0.93, 0.93),
    "sm_100": Machine(1800, 7500, 0.70, 0.88),
    "gfx942": Machine(1000, 4800, 0.45, 0.60),
}


def choose_encoder(
    D: int, L: int, k: int, dtype: torch.dtype, device: torch.device, path: str = "auto", activation: str = "topk"
) -> str:
    """``"fused"`` or ``"chunked"``: ``path`` if it names one, else ``FASTSAE_ENCODER``, else the cheaper by model.

    Per score, the chunked encoder writes and reads four bytes; the fused one writes and reads eight per group, and
    re-scores the candidates of the rows that hold a hidden group. Raises ``ValueError`` for any other name and
    where the fused kernel is asked for beyond what its select can hold.
    """
    path = os.environ.get("FASTSAE_ENCODER", "auto") if path == "auto" else path
    if path not in ("auto", "fused", "chunked"):
        raise ValueError(f"encoder path: expected 'auto', 'fused' or 'chunked', got {path!r}")
    family = gpu.gpu_family(device)
    config = configs.default_encode(D, L, dtype, family)
    num_groups = config.num_groups(L)
    fits = (k <= configs.MAX_FUSED_K and num_groups <= configs.MAX_GROUPS) or activation == "groupmax"
    if path == "fused" and not fits:
        raise ValueError(
            f"fused encoder: expected k <= {configs.MAX_FUSED_K} and at most {configs.MAX_GROUPS * config.GROUP} "
            f"latents, got k = {k}, {L} latents; use path='chunked'"
        )
    return path if path != "auto" else choose_for_family(D, L, k, dtype, family, activation)


def choose_for_family(D: int, L: int, k: int, dtype: torch.dtype, family: str, activation: str = "topk") -> str:
    """The cheaper of the two on GPUs of a ``family`` (``gpu.gpu_family``), of those that can do the shape."""
    num_groups = configs.default_encode(D, L, dtype, family).num_groups(L)
    fits = (k <= configs.MAX_FUSED_K and num_groups <= configs.MAX_GROUPS) or activation == "groupmax"
    if not fits or (dtype == torch.float32 and family not in ("gfx942", "interpreter")):
        return "chunked"  # float32 products have no matrix units on NVIDIA, where the vendor's kernel is better
    if activation == "groupmax" and L // k < configs.default_groupmax(dtype, family).BLOCK_L:
        return "chunked"  # most of a tile would lie outside its group
    if activation == "topk" and num_groups < 4 * k:
        return "chunked"  # crowded groups mean re-scoring most of the row
    if family == "interpreter":
        return "fused"
    group = configs.default_encode(D, L, dtype, family).GROUP
    return "fused" if _fused_seconds(D, L, k, group, family) <= _chunked_seconds(D, L, family) else "chunked"


def _fused_seconds(D: int, L: int, k: int, group: int, family: str) -> float:
    """Modelled time per token."""
    machine = _MACHINES[family]
    hidden_rows = min(1.0, k * k * group / (2 * L))  # expected pairs of winners in one group
    moved = 2 * 8 * L / group + hidden_rows * (k + group) * D * 2
    return 2 * D * L / (machine.tflops * 1e12 * machine.fused_efficiency) + moved / (machine.gigabytes * 1e9)


def _chunked_seconds(D: int, L: int, family: str) -> float:
    """Modelled time per token."""
    machine = _MACHINES[family]
    return 2 * D * L / (machine.tflops * 1e12 * machine.vendor_efficiency) + 2 * 4 * L / (machine.gigabytes * 1e9)
