"""What kind of GPU kernels are for.

Families are the targets that the test suite compiles for: ``sm_80`` (A100), ``sm_89`` (Ada, also Ampere and Blackwell
cards with 100 KB of shared memory), ``sm_90`` (Hopper), ``sm_100`` (datacenter Blackwell), ``gfx942`` (MI300), and
``interpreter``, whose tiles are tiny because it runs them one element loop at a time.
"""

from __future__ import annotations

import functools

import torch
import triton


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


def gpu_family(device: torch.device) -> str:
    """Which family's defaults serve ``device``."""
    if interpreting() or device.type != "cuda":
        return "interpreter"
    return _family_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _family_of_gpu(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    if capability[0] == 10:
        return "sm_100"
    if capability[0] == 9:
        return "sm_90"
    return "sm_80" if capability == (8, 0) else "sm_89"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s precision: float32 products are never rounded to tf32; narrower ones have no choice."""
    return "ieee" if dtype == torch.float32 else "tf32"
