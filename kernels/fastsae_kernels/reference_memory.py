"""How many bytes a step of the plain PyTorch reference allocates at most: dense matrices [N, L] of activations.

Shapes: N tokens, D width in, E width out, L latents. The sort alone holds scores, values, indices and buffers.
"""

from __future__ import annotations

from .cpu_memory import variance
from .step_sizes import FLOAT, INDEX, Sizes

__all__ = ["encoding", "forward", "scratch", "step", "variance"]


def scratch(_s: Sizes) -> int:
    """Kept between steps: nothing."""
    return 0


def encoding(s: Sizes) -> int:
    """Beyond x: scores, the same without NaN, and both of them sorted, with their places."""
    return s.selection_bytes + s.rows(s.latents) * 3 + s.rows(s.latents, INDEX)


def step(s: Sizes, rule: str | None) -> int:
    """A step beyond x and the target; ``rule`` updates rows in it, None: dense gradients that are there already."""
    losses = max(2 if s.wide else 1, s.prefixes)
    held = s.centered_bytes + s.selection_bytes + (losses + s.skip + 1) * s.rows(s.d_out)
    dense = 3 * s.rows(s.latents) + s.rows(s.latents, 1)
    gradients = FLOAT * s.latents * (s.d_in + 2 * s.d_out)
    update = 0 if rule is None else 3 * FLOAT * s.latents * max(s.d_in, s.d_out)
    return max(s.centered_bytes + encoding(s), held + max(dense + gradients, s.rows(s.latents) + gradients + update))


def forward(s: Sizes) -> int:
    """``FastSae.forward`` without gradients, beyond x."""
    decoding = 2 * s.rows(s.latents) + s.selection_bytes + s.rows(s.d_out)
    return max(variance(s), s.centered_bytes + encoding(s), decoding, s.selection_bytes + 4 * s.rows(s.d_out))
