"""A coder's training step as a CUDA graph: one launch in place of some forty.

Shapes: N tokens, D width in, E width out.

On a fast GPU a small coder's kernels take less time than Python needs to launch them. A graph is recorded once
and replayed on whatever lies in its inputs' memory; it computes what :func:`.step.coder_step` does, bit for bit. It
holds on to what a step allocates, each graph to its own: a shared pool dies with its last graph.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import dense_step
from .latent_step import fits_inside
from .row_update import scalars
from .step import Loss, StepOutput, coder_step
from .step_parts import Coder, RowStep, Sink

logger = logging.getLogger("fastsae")
_said: set[str] = set()

EAGER_STEPS = 2
"""Steps alike that come before a recording: they compile, and reserve what libraries need for themselves."""


class GraphedStep:
    """:func:`coder_step` for one coder, replayed from the third step on that is like the one before.

    Alike: shapes, dtypes, losses, k, and where the coder's and the optimizer's tensors lie. What no graph can do (dead
    latents, whose number changes; BatchTopK; a sink other than the kernel's) is done step by step, and the reason
    logged once, as is everything where memory does not suffice to record. The output's tensors are overwritten by the
    next step.
    """

    def __init__(self) -> None:
        self.replays = 0
        self._key: tuple[Any, ...] | None = None
        self._alike = 0
        self._recorded: _Recorded | None = None
        self._failed = False

    def __call__(
        self, x: Tensor, target: Tensor, coder: Coder, loss: Loss, sink: Sink, *, k: int, **options: Any
    ) -> StepOutput:
        """As :func:`coder_step`."""
        obstacle = _obstacle(x, coder, loss, sink, k, **options)
        if obstacle and obstacle not in _said:
            _said.add(obstacle)
            logger.info("no CUDA graph of a step with %s: going on kernel by kernel", obstacle)
        if self._failed or obstacle:
            return coder_step(x, target, coder, loss, sink, k=k, **options)
        assert isinstance(sink, RowStep)
        key = _key(x, target, coder, loss, sink, k, options)
        if key != self._key:
            self._key, self._alike, self._recorded = key, 0, None
        self._alike += 1
        if self._recorded is None and self._alike > EAGER_STEPS:
            try:
                self._recorded = _Recorded(x, target, coder, loss, sink, k, options)
            except RuntimeError as error:
                logger.warning("no CUDA graph could be recorded, going on step by step: %s", str(error).splitlines()[0])
                self._failed = True
        if self._recorded is None:  # with its numbers on the device: so the kernel to be recorded is loaded before
            sink.scalars = _numbers(sink).to(x.device, non_blocking=True)
            return coder_step(x, target, coder, loss, sink, k=k, **options)
        sink.begun = True
        self.replays += 1
        return self._recorded.replay(x, target, loss.variance, sink)


class _Recorded:
    """The graph, and the memory of its inputs and outputs."""

    def __init__(
        self, x: Tensor, target: Tensor, coder: Coder, loss: Loss, sink: RowStep, k: int, options: dict[str, Any]
    ):
        self._x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._target = self._x if target is x else torch.empty_like(target, memory_format=torch.contiguous_format)
        self._variance = torch.empty_like(loss.variance)
        self._scalars = x.new_empty(6, dtype=torch.float32)
        mine, own_loss = replace(sink, scalars=self._scalars), loss._replace(variance=self._variance)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x.device)  # torch's own lies on whichever device recorded first
        with (
            torch.cuda.device(x.device),
            torch.cuda.stream(stream),  # left again also where the recording cannot begin
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._out = coder_step(self._x, self._target, coder, own_loss, mine, k=k, **options)

    def replay(self, x: Tensor, target: Tensor, variance: Tensor, sink: RowStep) -> StepOutput:
        self._x.copy_(x)
        if self._target is not self._x:
            self._target.copy_(target)
        self._variance.copy_(variance)
        self._scalars.copy_(_numbers(sink), non_blocking=True)
        self._graph.replay()
        return self._out


def _numbers(sink: RowStep) -> Tensor:  # [6]
    return torch.tensor(scalars(sink.rule, sink.lr, sink.step), dtype=torch.float32, pin_memory=True)


def _obstacle(
    x: Tensor, coder: Coder, loss: Loss, sink: Sink, k: int, *, activation: str = "topk",
    implementation: str = "triton", peers: Any = None, selected: Any = None,
) -> str | None:  # fmt: skip
    """What no graph holds of such a step; None where one can be recorded."""
    if not len(x):
        return "no tokens"
    if activation == "batchtopk" or selected is not None or loss.prefixes:
        return "BatchTopK's or prefixes' selections"
    if peers is not None:
        return "latents on several ranks"
    if loss.dead is not None:
        return "dead latents to revive"
    slots = loss.multi_k or k
    if dense_step.pays(len(coder.bias), slots, x.device):
        return f"{len(coder.bias)} latents for {slots} active ones, whose backward is dense products"
    if not isinstance(sink, RowStep) or not fits_inside(sink):
        return "an optimizer's step outside of the backward kernel (rows of two widths, or too wide)"
    if not x.is_cuda or implementation != "triton":
        return f"implementation {implementation} on {x.device.type}"
    return None


def _key(
    x: Tensor, target: Tensor, coder: Coder, loss: Loss, sink: RowStep, k: int, options: dict[str, Any]
) -> tuple[Any, ...]:
    """What a recording is made for; two numbers change with every step: the learning rate and the step's."""
    rows = (sink.encoder, sink.decoder)
    matrices = [t for r in rows for t in (r.weight, r.low, *r.state.values())]
    places = tuple((t.data_ptr(), t.shape, t.dtype) for t in (*coder, *matrices) if isinstance(t, Tensor))
    about = (x.shape, x.dtype, target is x, target.shape, target.dtype, k, *sorted(options.items()))
    about += tuple(r.unit_rows for r in rows)
    return (*about, loss._replace(variance=loss.variance.dtype), coder.centered, sink.rule, places)  # type: ignore
