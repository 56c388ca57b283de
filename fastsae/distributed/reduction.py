"""Sums of gradients over ranks, once per optimizer step: the rows of latents that were active anywhere, and no others.

Shapes: D width, L latents, R rows that travel.

    1. one byte per latent: 0 silent, 1 with a gradient, 2 fired; the maximum over ranks, all coders together
    2. small tensors (biases, skip connections) and the step's sums, all coders together, in float32
    3. per coder, both matrices: rows with a gradient, or all of them where they are not clearly fewer
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..metrics import TrainingMetrics
from ..sae import FastSae
from .world import World

FEW = 0.75
"""The share of rows up to which packing them pays: it costs a read and a write of each."""


class GradientReduction:
    """Sums the gradients of coders that every rank holds; afterwards they are the same bits everywhere.

    ``dtype`` is that of the matrices' gradients on their way.
    """

    def __init__(self, world: World, dtype: torch.dtype = torch.float32):
        self.world, self.dtype = world, dtype
        self._share: dict[str, float] = {}  # of rows with a gradient, in the last step

    @torch.no_grad()
    def reduce(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> None:
        for coder in coders.values():
            for parameter in coder.parameters():
                if parameter.grad is None:  # nothing to train on here
                    parameter.grad = torch.zeros_like(parameter)
        touched = self._share_latents(coders, metrics)
        self._sum_small(coders, metrics)
        for name, coder in coders.items():
            self._sum_matrices([p.grad for p in matrices(coder) if p.grad is not None], touched[name])

    def _share_latents(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> dict[str, Tensor]:
        """Fired latents become those of all ranks; returns those with a gradient anywhere, bool [L] by coder."""
        codes = []
        for name, coder in coders.items():
            touched = torch.stack([(p.grad != 0).any(1) for p in matrices(coder) if p.grad is not None]).any(0)
            codes.append(torch.maximum(touched.to(torch.uint8), 2 * metrics[name].fired.to(torch.uint8)))
        shared = self.world.all_max(torch.cat(codes)).split([len(code) for code in codes])
        for name, code in zip(coders, shared, strict=True):
            metrics[name].fired.copy_(code == 2)
        return {name: code > 0 for name, code in zip(coders, shared, strict=True)}

    def _sum_small(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> None:
        tensors = [metrics[name].step_sums for name in coders]
        for coder in coders.values():
            big = {id(p) for p in matrices(coder)}
            tensors += [p.grad for p in coder.parameters() if id(p) not in big and p.grad is not None]
        flat = self.world.all_sum(torch.cat([t.flatten() for t in tensors]))
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def _sum_matrices(self, grads: list[Tensor], touched: Tensor) -> None:
        rows = touched.nonzero()[:, 0]
        if len(rows) > FEW * len(touched):
            if all(grad.dtype == self.dtype for grad in grads):
                for grad in grads:
                    self.world.all_sum(grad)
                return
            rows = torch.arange(len(touched), device=touched.device)
        flat = self.world.all_sum(torch.cat([grad[rows].to(self.dtype).flatten() for grad in grads]))
        for grad, summed in zip(grads, flat.split([len(rows) * grad.shape[1] for grad in grads]), strict=True):
            grad[rows] = summed.view(len(rows), -1).to(grad.dtype)


def matrices(coder: FastSae) -> list[Tensor]:
    """The two parameters with a row per latent."""
    return [p for p in (coder.encoder.weight, coder.W_dec) if p is not None]
