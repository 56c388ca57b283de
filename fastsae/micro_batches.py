"""Training a coder on a batch in parts, more of them where memory runs out.

Shapes: N tokens, D width in, E width out.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import TrainConfig
from .errors import OutOfMemoryError, is_out_of_memory
from .joint import joint_step, select
from .metrics import TrainingMetrics
from .ops import graphed_step, selection_of
from .row_optimizer import RowOptimizer
from .sae import FastSae

if TYPE_CHECKING:
    from .ops import GraphedStep

logger = logging.getLogger("fastsae")

THRESHOLD_RATE = 0.01
"""The least weight of a step in BatchTopK's threshold: SAELens' topk_threshold_lr."""


class MicroBatches:
    """How many ``parts`` a batch's activations are trained in, each of its own forward and backward.

    Losses are sums over tokens, and the variance and BatchTopK's selection are the whole batch's, so any number of
    parts gives the same numbers, to rounding. Where memory runs out, the part that did not fit is halved, and the
    number of parts is doubled for what follows. The matrices' update inside the backward pass is for whole batches
    only: the first row it changes rules a second try out, and :func:`joint_step` says so; until then, nothing was
    changed.
    """

    def __init__(self, parts: int, *, graphs: bool = False):
        self.parts = parts
        self._graphed: dict[str, GraphedStep] | None = {} if graphs else None
        """By coder: its whole batches' step as a CUDA graph."""

    def train(
        self,
        coder: FastSae,
        x: Tensor,  # [N, D]
        y: Tensor,  # [N, E]
        metrics: TrainingMetrics,
        cfg: TrainConfig,
        *,
        variance: Tensor,  # []
        count: float | Tensor,  # tokens of the whole batch, of which other ranks may have some
        share: float,
        optimizer: RowOptimizer | None,
        inside: bool,
        k: int,
        step: int = 0,  # from 0
    ) -> None:
        """Gradients and metrics of a batch; ``inside``: and the matrices' step, if memory lasts for it."""
        graphed = self._graphed_step(metrics.name) if inside else None
        todo, batch, least = deque(_parts(0, len(y), self.parts)), None, []
        while todo:
            begin, end = todo.popleft()
            try:
                if batch is None and coder.cfg.activation == "batchtopk" and end - begin < len(y):
                    batch = select(coder, x, optimizer, k, self.parts)
                rows = x[begin:end]
                losses = joint_step(
                    coder, rows, rows if y is x else y[begin:end], variance, cfg, dead=metrics.dead_ids(),
                    num_dead=metrics.num_dead(), share=share, optimizer=optimizer, inside=inside, k=k,
                    selected=None if batch is None else selection_of(batch, begin, end), graphed=graphed,
                )  # fmt: skip
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if coder.peers is not None:  # other ranks are in the middle of this part
                    raise OutOfMemoryError(
                        f"{metrics.name}: out of memory on {end - begin} tokens; go on from the last checkpoint with a "
                        "higher --micro-acc-steps, or start with a higher --distribute-latents"
                    ) from error
                losses = None  # what the error holds on to is freed at the end of this block
            if losses is None:
                inside, graphed = False, None
                self._halve(metrics.name, end - begin, len(y))
                todo.extendleft(reversed(_parts(begin, end, 2)))
            else:
                metrics.add(losses, (end - begin) / count)
                least += [] if losses.least is None else [losses.least]
        if least:
            coder.learn_threshold(torch.stack(least).min(), max(THRESHOLD_RATE, 1 / (step + 1)))

    def _graphed_step(self, name: str) -> GraphedStep | None:
        if self._graphed is not None and name not in self._graphed:
            self._graphed[name] = graphed_step()
        return None if self._graphed is None else self._graphed[name]

    def _halve(self, name: str, tokens: int, all_tokens: int) -> None:
        """Of a batch of ``all_tokens``, a part of ``tokens`` did not fit: make parts of half that size."""
        self._graphed = None  # their memory is needed, and parts are not recorded
        if tokens == 1:
            raise OutOfMemoryError(
                f"{name}: out of memory with one token at a time; lower --expansion-factor or --num-latents, "
                "train fewer hookpoints at once, or choose --optimizer adam8bit"
            )
        parts = -(-all_tokens // (-(-tokens // 2)))
        if parts > self.parts:  # else said already, of another part of this batch
            self.parts = parts
            logger.warning(
                "%s: out of memory on %d tokens; from here on activations are trained in %d parts "
                "(--micro-acc-steps %d), which changes no number beyond rounding", name, tokens, parts, parts,
            )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _parts(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    """``begin ... end - 1`` in at most so many parts of one size, but for the last; none of nothing."""
    size = max(1, -(-(end - begin) // parts))
    return [(first, min(first + size, end)) for first in range(begin, end, size)]
