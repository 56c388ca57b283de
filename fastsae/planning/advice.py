"""What to change so that a run fits: the micro-batch first, then one option at a time, each planned anew.

Shapes: N tokens of a batch on a rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..config import TrainConfig
from ..errors import ConfigError
from .layout import layout
from .memory import Situation, memory
from .result import Advice, Change, Memory

RANKS = (2, 4, 8, 16, 32, 64)


def advise(s: Situation, needed: Memory) -> Advice:
    """The fewest micro-batches that fit, and where there is no such number, what else makes it fit."""
    tokens = s.cfg.batch_size * s.tokens * s.layout.joined
    if needed.available is None:
        return Advice(None, None, ())
    parts = fitting_parts(s, needed.available)
    if parts is not None:
        return Advice(parts, -(-tokens // parts), ())
    return Advice(None, None, tuple(_changes(s, needed.available)))


def fitting_parts(s: Situation, available: int) -> int | None:
    """``--micro-acc-steps``: what is asked for, doubled until the run fits; None where it never does."""
    if s.cfg.loss_fn != "fvu":
        return 1 if memory(s, available).fits else None
    parts = s.cfg.micro_acc_steps
    while parts <= s.cfg.batch_size * s.tokens * s.layout.joined:
        if memory(changed(s, micro_acc_steps=parts), available).fits:
            return parts
        parts *= 2
    return None


def changed(s: Situation, **options: object) -> Situation:
    """The same run with other options of :class:`TrainConfig`."""
    cfg: TrainConfig = dataclasses.replace(s.cfg, **options)  # type: ignore[arg-type]
    return dataclasses.replace(s, cfg=cfg, work=dataclasses.replace(s.work, cfg=cfg))


def spread(s: Situation, ranks: int, **options: object) -> Situation | None:
    """The same run on so many ranks; None where its coders cannot be spread so."""
    try:
        other = changed(s, **options)
        return dataclasses.replace(other, layout=layout(other.cfg, s.specs, ranks))
    except ConfigError:
        return None


def _changes(s: Situation, available: int) -> Iterator[Change]:
    """Each alone, the least intrusive first; those that fit."""
    batch, steps = s.cfg.batch_size, s.cfg.grad_acc_steps
    while batch > 1:
        batch, steps = batch // 2, steps * 2
        needed = memory(changed(s, batch_size=batch, grad_acc_steps=steps), available)
        if needed.fits:
            yield Change(f"--batch-size {batch} --grad-acc-steps {steps}", needed.peak)
            break
    if s.cfg.optimizer not in ("adam8bit", "bnb_adam8bit"):
        yield from _with_parts("--optimizer adam8bit", changed(s, optimizer="adam8bit"), available)
    yield from _fewer(s, available)
    if s.layout.ranks == 1 and s.cfg.loss_fn == "fvu":
        for ways in ("distribute_modules", "distribute_latents"):
            for ranks in RANKS:
                other = spread(s, ranks, **{ways: True if ways == "distribute_modules" else ranks})
                value = "" if ways == "distribute_modules" else f" {ranks}"
                found = other and list(
                    _with_parts(f"--ranks {ranks} --{ways.replace('_', '-')}{value}", other, available)
                )
                if found:
                    yield from found
                    break


def _with_parts(what: str, s: Situation, available: int) -> Iterator[Change]:
    """The change alone, or with as many micro-batches as it takes."""
    parts = fitting_parts(s, available)
    if parts is not None:
        more = "" if parts == s.cfg.micro_acc_steps else f" --micro-acc-steps {parts}"
        yield Change(what + more, memory(changed(s, micro_acc_steps=parts), available).peak)


def _fewer(s: Situation, available: int) -> Iterator[Change]:
    """As many of the hookpoints as fit, the first ones: the others in runs of their own."""
    names = list(s.structure.hookpoints)
    for count in range(len(names) - 1, 0, -1):
        kept = set(names[:count])
        specs = {name: spec for name, spec in s.specs.items() if name.partition("/")[0] in kept}
        other = dataclasses.replace(s, specs=specs, layout=layout(s.cfg, specs, s.layout.ranks))
        needed = memory(other, available)
        if needed.fits:
            yield Change(f"{count} of the {len(names)} hookpoints at a time", needed.peak)
            return
