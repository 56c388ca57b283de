"""How well coders do on sequences that they were not trained on.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .activations import Use
from .error_sums import ErrorSums
from .sae import FastSae, ForwardOutput


@torch.no_grad()
def held_out_metrics(
    coders: dict[str, FastSae], batches: Iterable[dict[str, Tensor]], run: Callable[[dict[str, Tensor], Use], None],
    all_sum: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """FVU and L0 of every coder, with the weights it has now, over ``batches``.

    ``run`` brings a batch's activations to the coders; ``all_sum`` adds up what ranks measured that hold other batches.
    """
    centres = {name: None if all_sum is None else coder.b_dec.double() for name, coder in coders.items()}
    measured = {name: ErrorSums(centre) for name, centre in centres.items()}

    def measure(hookpoint: str, x: Tensor, y: Tensor) -> None:
        for name, coder in coders.items():
            if name.partition("/")[0] == hookpoint and len(y):
                measured[name].add(y[None], _as_one_sequence(coder(x, y)))

    for rows in batches:
        run(rows, measure)
    if all_sum is not None:
        for sums in measured.values():
            sums.add_ranks(all_sum)
    return {name: sums.totals() for name, sums in measured.items()}


def _as_one_sequence(out: ForwardOutput) -> ForwardOutput:
    """Tokens [N, ...] -> [1, N, ...]."""
    return out._replace(
        sae_out=out.sae_out[None], latent_acts=out.latent_acts[None], latent_indices=out.latent_indices[None]
    )
