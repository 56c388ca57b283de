"""Ways to spread a run over several ranks: what each takes of memory and of the links, and which one suits.

Shapes: N tokens of a rank's part of a batch, D width in, E width out, L latents, R ranks.

Bytes over a link are what a rank sends in one optimizer step, modelled: a sum over R ranks sends each rank's numbers
2 (R - 1) / R times (ring), a gathering R - 1 times, and rows on their way to an owner once per owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .advice import spread
from .memory import Situation, memory
from .result import Mode

EVEN = 1.5
"""Work of the rank with the most, over the mean, up to which a mode is recommended before those that send more."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank gives to operations of each kind in an optimizer step; the rank that gives the most."""

    summed: int
    gathered: int
    sent: int
    between: int = 0
    """Summed over groups of ranks that hold a coder's latents together."""

    def over_link(self, ranks: int, groups: int = 1) -> int:
        """What leaves the rank, where sums and gatherings are over so many; of them there are so many groups."""
        return self.within(ranks) + self.across(groups)

    def within(self, ranks: int) -> int:
        """What leaves it for others of its group."""
        return round(self.summed * 2 * (ranks - 1) / ranks + self.gathered * (ranks - 1) + self.sent)

    def across(self, groups: int) -> int:
        """What leaves it for other groups."""
        return round(self.between * 2 * (groups - 1) / groups)


def modes(s: Situation, available: int | None) -> tuple[Mode, ...]:
    """Those that can do the run on its number of ranks; of those not known to be too large one is recommended.

    None for one rank.
    """
    found = []
    for options, other in _candidates(s):
        needed = memory(other, available)
        ranks = other.layout.joined if other.cfg.distribute_latents > 1 else other.layout.ranks
        link = traffic(other).over_link(ranks, other.layout.ranks // ranks)
        found.append((options, needed.peak, needed.fits, link, load(other)))
    fitting = [mode for mode in found if mode[2] is not False]
    best = min(fitting, key=lambda mode: (mode[4] > EVEN, mode[3]), default=None)
    return tuple(Mode(*mode, recommended=mode is best) for mode in found)


def _candidates(s: Situation) -> Iterator[tuple[str, Situation]]:
    ranks, plain = s.layout.ranks, {"distribute_modules": False, "distribute_latents": 1}
    if ranks == 1:
        return
    ways = [("", plain), ("--distribute-modules", plain | {"distribute_modules": True})]
    for parts in range(2, ranks + 1):
        if ranks % parts == 0:
            ways.append((f"--distribute-latents {parts}", plain | {"distribute_latents": parts}))
    for options, changes in ways:
        if (other := spread(s, ranks, **changes)) is not None:
            yield options, other


def load(s: Situation) -> float:
    """Work of the rank with the most, in parameters times tokens, over the mean of all."""
    each = [
        sum(s.specs[name].parameters * latents // s.specs[name].num_latents for name, latents in held.items())
        for held in s.layout.latents
    ]
    return max(each) * len(each) / sum(each)


def traffic(s: Situation) -> Traffic:
    """Of the rank that sends the most, at most: as if every latent were active somewhere."""
    steps, tokens = s.cfg.grad_acc_steps, s.cfg.batch_size * s.tokens
    gathered = 8 * (1 + steps)  # numbers of tokens
    if s.layout.mode == "distribute-modules":
        return Traffic(0, gathered, steps * tokens * max(_owed(s, rank) for rank in range(s.layout.ranks)))
    if s.layout.mode == "replicas":
        return Traffic(_gradients(s) + steps * _variances(s), gathered, 0)
    summed, sent, groups = 0, 0, s.layout.ranks // s.layout.joined
    for name in s.structure.hookpoints:
        sent += (s.layout.joined - 1) * tokens * _row_bytes(s, name)
    for spec in s.specs.values():
        wide = 2 if spec.sae.multi_topk else 1
        summed += wide * 4 * tokens * s.layout.joined * spec.d_out + (0 if spec.sae.transcode else 4 * spec.d_in)
        slots = spec.sae.k * (4 if spec.sae.multi_topk else 1)
        gathered += steps * 8 * tokens * s.layout.joined * (slots if spec.sae.activation == "topk" else 0)
    between = _gradients(s) + steps * _variances(s) if groups > 1 else 0
    return Traffic(steps * summed, gathered, steps * sent, between)


def _row_bytes(s: Situation, hookpoint: str) -> int:
    at = s.structure.hookpoints[hookpoint]
    return s.work.dtype.itemsize * (at.d_out + ((at.d_in or 0) if s.cfg.sae.transcode else 0))


def _owed(s: Situation, rank: int) -> int:
    """Bytes per token that a rank sends to the owners of coders that it does not hold itself."""
    owners = {
        hookpoint: {r for r, held in enumerate(s.layout.latents) if any(n.partition("/")[0] == hookpoint for n in held)}
        for hookpoint in s.structure.hookpoints
    }
    return sum(len(ranks - {rank}) * _row_bytes(s, hookpoint) for hookpoint, ranks in owners.items())


def _gradients(s: Situation) -> int:
    """What ``GradientReduction`` sums: a byte per latent, small tensors and sums in float32, both matrices."""
    total, size = 0, 2 if s.cfg.grad_reduce_dtype == "bfloat16" else 4
    for name, latents in s.layout.heaviest.items():
        spec = s.specs[name]
        small = latents + spec.d_out + (spec.d_in * spec.d_out if spec.sae.skip_connection else 0)
        sums = 4 + max(0, len(spec.sae.prefixes_for(spec.num_latents)) - 1)
        total += latents + 4 * (small + sums) + size * latents * (spec.d_in + spec.d_out)
    return total


def _variances(s: Situation) -> int:
    """The whole batch's variance at every hookpoint, in float64."""
    return sum(8 * (at.d_out + 2) * at.calls for at in s.structure.hookpoints.values())
