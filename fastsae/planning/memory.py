"""The most memory that a run takes on one device: what stays, and beside it the work that takes the most.

Shapes: B sequences of S tokens in a batch on this rank, N tokens that coders there are trained on together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..coders import CoderSpec
from ..config import TrainConfig
from ..distributed.modules import HELD_BYTES
from .kept import FLOAT, Kept, kept, takes_step_in_place
from .layout import Layout
from .result import Memory
from .structure import Structure
from .work import Work

MUON = 10
"""Bytes per number of a matrix that muon's update holds: itself in float32, and three in bfloat16 on its way."""


@dataclass(frozen=True)
class Situation:
    """All that memory depends on."""

    cfg: TrainConfig
    structure: Structure
    specs: Mapping[str, CoderSpec]
    layout: Layout
    work: Work
    tokens: int
    """Per sequence."""
    held_out: int
    """Sequences."""
    process: int = 0
    """Bytes that Python and its libraries take beside all tensors, on the same device."""
    on_gpu: bool = False
    """Where the optimizer keeps narrow copies of the matrices."""

    @property
    def in_place(self) -> bool:
        """Whether matrices take their step inside the backward pass."""
        calls = max(at.calls for at in self.structure.hookpoints.values())
        return takes_step_in_place(self.cfg, calls, fuses=self.layout.fuses, parts=self.cfg.micro_acc_steps)

    def coder_bytes(self, name: str, latents: int) -> Kept:
        """What the coder of that name, or so many latents of it, keeps."""
        low = self.work.dtype if self.on_gpu and self.work.dtype.itemsize < FLOAT else None
        return kept(self.specs[name], latents, self.cfg, in_place=self.in_place, low=low)


def memory(situation: Situation, available: int | None) -> Memory:
    """On the device that holds the most."""
    s, held = situation, situation.layout.heaviest
    stays = sum((s.coder_bytes(name, latents) for name, latents in held.items()), Kept())
    buffers = _scratch(s, held) + _token_buffers(s, held) + _recorded(s, held)
    moments = list(_moments(s, held, stays.weights))
    when, activations, step = max(moments, key=lambda moment: moment[1] + moment[2])
    base = s.structure.weight_bytes + stays.total + buffers
    return Memory(
        s.structure.weight_bytes, stays, buffers, activations, step, base + activations + step, when, s.process,
        available,
    )  # fmt: skip


def _rows(s: Situation) -> int:
    """Tokens that a step trains a coder on, on one rank."""
    return s.cfg.batch_size * s.tokens * s.layout.joined


def _measured_rows(s: Situation) -> int:
    """Held-out tokens that a coder gets together."""
    return min(s.held_out, s.cfg.batch_size) * s.tokens * s.layout.joined


def _scratch(s: Situation, held: Mapping[str, int]) -> int:
    """What the encoder keeps for its next call, by the largest of its calls."""
    calls = (-(-_rows(s) // s.cfg.micro_acc_steps), _measured_rows(s))
    sizes = (s.work.scratch(s.specs[name], latents, tokens) for name, latents in held.items() for tokens in calls)
    return max(sizes, default=0)


def _token_buffers(s: Situation, held: Mapping[str, int]) -> int:
    """``--token-buffer``'s tokens, of every hookpoint whose coders are here."""
    return s.cfg.token_buffer * sum(_row_bytes(s, hookpoint) for hookpoint in {n.partition("/")[0] for n in held})


def _recorded(s: Situation, held: Mapping[str, int]) -> int:
    """``--cuda-graph``'s memory: what every coder's step takes, and its inputs."""
    if not s.cfg.cuda_graph:
        return 0
    steps = (s.work.step(s.specs[name], latents, _rows(s), 1, in_place=True) for name, latents in held.items())
    return sum(steps) + sum(_rows(s) * _row_bytes(s, name.partition("/")[0]) for name in held)


def _row_bytes(s: Situation, hookpoint: str) -> int:
    """Of one token's activations, for a transcoder both."""
    at = s.structure.hookpoints[hookpoint]
    return s.work.dtype.itemsize * (at.d_out + ((at.d_in or 0) if s.cfg.sae.transcode else 0))


def _moments(s: Situation, held: Mapping[str, int], weights: int) -> Iterator[tuple[str, int, int]]:
    """(what goes on, the model's activations then, what the work makes): each a candidate for the peak."""
    forward, B = s.structure.forward, s.cfg.batch_size
    yield "the model's forward", forward.most(B), _sending(s)
    if s.cfg.optimizer == "muon":
        yield "the optimizer's step", 0, MUON * max(_largest_matrix(s.specs[n], latents) for n, latents in held.items())
    rest = min(s.held_out, B)
    averaging = weights if s.cfg.optimizer == "signum" else 0  # the weights trained on, while averages stand in
    for name, latents in held.items():
        hookpoint, spec = name.partition("/")[0], s.specs[name]
        copies = _copies(s, hookpoint)
        step = s.work.step(spec, latents, _rows(s), s.cfg.micro_acc_steps, in_place=s.in_place)
        step = 0 if s.cfg.cuda_graph else step  # replayed in memory of its own
        late = s.layout.mode == "distribute-modules"  # trained after the forward, when its activations are gone
        yield f"training {name}", 0 if late else forward.held(hookpoint, B), copies + step
        if rest:
            step = s.work.forward(spec, latents, _measured_rows(s))
            yield f"measuring {name}", 0 if late else forward.held(hookpoint, rest), copies + averaging + step


def _largest_matrix(spec: CoderSpec, latents: int) -> int:
    return latents * max(spec.d_in, spec.d_out)


def _copies(s: Situation, hookpoint: str) -> int:
    """Activations once more: without excluded tokens, shuffled, or joined with other ranks'."""
    rows = s.cfg.batch_size * s.tokens * _row_bytes(s, hookpoint)
    made = rows * (bool(s.cfg.exclude_tokens) + bool(s.cfg.token_buffer))
    if s.layout.mode == "distribute-modules":
        return made + _joined(s) + _sending(s)
    return made + (rows * (s.layout.joined + 1) if s.layout.joined > 1 else 0)


def _joined(s: Situation) -> int:
    """What an owner holds back until the forward is over, at most ``HELD_BYTES`` and one more."""
    rows = _rows(s)
    here = [rows * _row_bytes(s, name) for name in {n.partition("/")[0] for n in s.layout.heaviest}]
    return min(sum(here), HELD_BYTES + max(here, default=0))


def _sending(s: Situation) -> int:
    """Copies on their way to other ranks, until the batch ends."""
    if s.layout.mode != "distribute-modules":
        return 0
    own = {name.partition("/")[0] for name in s.layout.heaviest}
    rows = s.cfg.batch_size * s.tokens
    return sum(rows * _row_bytes(s, name) for name in s.structure.hookpoints if name not in own)
