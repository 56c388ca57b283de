"""Dense activations of a coder, for consumers that want every latent.

Shapes: ``...`` any leading dimensions, D width, L latents, K active latents.
"""

from __future__ import annotations

from torch import Tensor

from ..sae import FastSae


def dense_latents(sae: FastSae, x: Tensor) -> Tensor:
    """Activations [..., L] of x [..., D], in x's dtype; zero where a latent is not active."""
    acts, indices, _ = sae.encode(x)
    empty = acts.new_zeros(*acts.shape[:-1], sae.num_latents)
    return empty.scatter(-1, indices, acts).to(x.dtype)
