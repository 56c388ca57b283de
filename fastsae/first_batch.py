"""What a hookpoint's first activations are for: the biases of new coders, and by what these are known again.

Shapes: N tokens, D width, E output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .coders import Mean, batch_mean
from .origin import Origin
from .pretrained import warn_of_other_size
from .sae import FastSae


class FirstBatches:
    """Which hookpoints a run has met, and how large their activations were.

    ``finetuned``: coders that have biases, by name, and where they are from.
    """

    def __init__(self, finetuned: dict[str, Origin], mean_of: Mean):
        self._finetuned, self._mean_of = dict(finetuned), mean_of
        self.initialised = set(finetuned)
        """Names of coders that have their biases."""
        self.sizes: dict[str, dict[str, float]] = {}
        """By hookpoint, what :func:`activation_size` gave."""

    def meet(self, hookpoint: str, x: Tensor, y: Tensor, coders: Mapping[str, FastSae]) -> None:  # [N, D], [N, E]
        """See activations of a hookpoint, for its ``coders``; nothing is done from the second time on."""
        if hookpoint not in self.sizes:
            self.sizes[hookpoint] = activation_size(y, self._mean_of)
        for name, coder in coders.items():
            if name in self._finetuned:
                warn_of_other_size(name, self._finetuned.pop(name), self.sizes[hookpoint])
            if name not in self.initialised:
                init_biases(coder, x, y, self._mean_of)
                self.initialised.add(name)

    def state_dict(self) -> dict[str, Any]:
        return {"initialised": sorted(self.initialised), "activation_sizes": self.sizes}

    def load_state_dicts(self, *parts: dict[str, Any]) -> None:
        """Those of all ranks, where coders were spread over some."""
        self.initialised = {name for part in parts for name in part["initialised"]}
        self.sizes = {name: size for part in parts for name, size in part["activation_sizes"].items()}


@torch.no_grad()
def activation_size(y: Tensor, mean_of: Mean = batch_mean) -> dict[str, float]:  # [N, E]
    """The norm of the activations' mean, and the mean of their norms: by these a coder knows its activations again."""
    norms = mean_of(y.float().norm(dim=1, keepdim=True))[0]
    values = torch.stack([mean_of(y).norm(), norms]).tolist()
    return dict(zip(("activation_mean", "activation_norm"), values, strict=True))


@torch.no_grad()
def init_biases(coder: FastSae, x: Tensor, y: Tensor, mean_of: Mean = batch_mean) -> None:  # [N, D], [N, E]
    """Centre a new coder on its first batch: b_dec is the targets' mean, and pre-activations have mean 0."""
    coder.b_dec.copy_(mean_of(y))
    if coder.cfg.transcode:  # encodes x itself: its mean is taken out by the bias
        coder.encoder.bias.copy_(-(coder.encoder.weight @ mean_of(x).to(coder.dtype)))
