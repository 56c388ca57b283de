"""How the coders of a run are spread over its ranks: what differs, as one object with the same few methods.

Shapes: N tokens of a batch on this rank (0 is possible where there are others), D width, L latents.

``StepTrainer`` calls them in this order: ``tokens`` before a step; in it, at every hookpoint of every batch,
``deliver``, and inside of that ``mean_of`` and ``variance``; ``end_batch`` after every batch; ``reduce`` before the
optimizer. Every rank makes the same calls, also with nothing to train on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .. import loss
from ..coders import CoderSpec, batch_mean
from ..metrics import TrainingMetrics
from ..sae import FastSae
from .reduction import GradientReduction
from .world import World

Value = TypeVar("Value")

Train = Callable[[str, Tensor, Tensor], None]
"""Called as ``train(hookpoint, x [N, D], y [N, E])``: the gradients, or the step, of the coders there."""


class Strategy:
    """One process that holds everything."""

    fuses = True
    """Whether an optimizer may act inside the backward pass: no other rank's gradients are to come."""

    def __init__(self, world: World):
        self.world = world
        self.all_sum: Callable[[Tensor], Tensor] | None = None
        """Sums a tensor over ranks that hold other batches of the held-out data, in place; None: there are none."""

    def owns(self, coder: str) -> bool:
        """Whether this rank has the coder of that name, or a part of it."""
        return True

    def make(self, spec: CoderSpec, implementation: str) -> FastSae:
        """A new coder, or this rank's part of it."""
        return FastSae(spec.d_in, spec.sae, dtype=torch.float32, d_out=spec.d_out, implementation=implementation)

    def tokens(self, counts: list[int], signal: int) -> tuple[list[int], int]:
        """(tokens of each batch of a step over all ranks, the highest signal that any rank received)."""
        every = self.world.all_gather_sizes([signal, *counts])
        return [sum(column) for column in list(zip(*every, strict=True))[1:]], max(row[0] for row in every)

    def deliver(self, hookpoint: str, x: Tensor, y: Tensor, train: Train) -> None:
        """Have the coders at ``hookpoint`` trained on its activations, now or until :meth:`end_batch`."""
        train(hookpoint, x, y)

    def end_batch(self, train: Train) -> None:
        """What was held back is trained on now."""

    def mean_of(self, rows: Tensor) -> Tensor:  # [N, D] -> [D]
        """The mean over the whole batch, float32."""
        return batch_mean(rows)

    def variance(self, y: Tensor) -> tuple[Tensor, float | Tensor]:  # [N, D]
        """(Σ ‖y - mean‖², number of tokens) of the whole batch."""
        return loss.total_variance(y), len(y)

    def reduce(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> None:
        """Make gradients, fired latents and the step's sums those of all ranks, once per step."""

    def gather(self, own: dict[str, Value]) -> dict[str, Value]:
        """What each rank knows of its coders, of all of them, on every rank."""
        return own

    @property
    def part(self) -> tuple[int, int]:
        """(number of this rank among those that save, how many these are); a number beyond them saves nothing."""
        return self.world.rank, 1


class Replicas(Strategy):
    """Every rank holds all coders and trains them on its part of each batch; gradients are summed once per step."""

    fuses = False

    def __init__(self, world: World, reduction: GradientReduction):
        super().__init__(world)
        self._reduction, self.all_sum = reduction, world.all_sum

    def mean_of(self, rows: Tensor) -> Tensor:
        count = torch.full((1,), len(rows), dtype=torch.float64, device=rows.device)
        sums = self.world.all_sum(torch.cat([rows.sum(0, dtype=torch.float64), count]))
        return (sums[:-1] / sums[-1]).float()

    def variance(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """By each part's own mean and spread about it; only what is small is combined, in float64."""
        count = torch.full((1,), len(y), dtype=torch.float64, device=y.device)
        mean = y.sum(0, dtype=torch.float64) / count.clamp(min=1)
        near = mean.float()
        spread = (y.float() - near).square().sum().double() - count * (mean - near.double()).square().sum()
        sums = self.world.all_sum(torch.cat([count * mean, count, spread + count * mean.square().sum()]))
        total, count, square = sums[:-2], sums[-2], sums[-1]
        return (square - total.square().sum() / count).float(), count

    def reduce(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> None:
        self._reduction.reduce(coders, metrics)
