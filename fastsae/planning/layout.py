"""Which rank holds what: the coders, or parts of them, that each process of a run trains.

Shapes: N tokens of a rank's part of a batch, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..coders import CoderSpec
from ..config import TrainConfig
from ..distributed.balance import owners
from ..distributed.latent_peers import latent_bounds
from ..errors import ConfigError

MODES = ("one process", "replicas", "distribute-modules", "distribute-latents")


@dataclass(frozen=True)
class Layout:
    """How a run's coders lie on its ranks."""

    mode: str
    """One of ``MODES``."""

    ranks: int
    latents: tuple[dict[str, int], ...]
    """Of every rank, how many latents of which coders it holds."""

    joined: int
    """How many ranks' tokens a rank trains its coders on, together: N times that."""

    @property
    def fuses(self) -> bool:
        """Whether an optimizer may act inside the backward pass: no other rank's gradients are to come."""
        return self.mode in ("one process", "distribute-modules") or self.joined == self.ranks

    @property
    def heaviest(self) -> dict[str, int]:
        """The rank that holds the most."""
        return max(self.latents, key=lambda held: sum(held.values()))


def layout(cfg: TrainConfig, specs: Mapping[str, CoderSpec], ranks: int) -> Layout:
    """As :func:`fastsae.distributed.strategies.make_strategy` would have it on so many ranks.

    Raises :class:`ConfigError` where they cannot be divided as ``cfg`` asks.
    """
    whole = {name: spec.num_latents for name, spec in specs.items()}
    split = cfg.distribute_latents
    if split > 1:
        if ranks % split:
            raise ConfigError(
                f"distribute_latents: expected a divisor of the number of processes, {ranks}, got {split}; "
                f"try --ranks {split}"
            )
        bounds = {name: latent_bounds(spec.sae, spec.d_in, split) for name, spec in specs.items()}
        slices = [{name: ends[part + 1] - ends[part] for name, ends in bounds.items()} for part in range(split)]
        return Layout(MODES[3], ranks, tuple(slices[rank % split] for rank in range(ranks)), split)
    if cfg.token_buffer and ranks > 1 and not cfg.distribute_modules:
        raise ConfigError(
            "token_buffer: expected one process, or --distribute-modules, got several that would each hold tokens of "
            "their own; leave it out, or shuffle a cache (--activations, --shuffle-tokens)"
        )
    if ranks == 1:
        return Layout(MODES[0], 1, (whole,), 1)
    if cfg.distribute_modules:
        owner = owners({name: spec.parameters for name, spec in specs.items()}, ranks)
        held = ({name: whole[name] for name in whole if owner[name] == rank} for rank in range(ranks))
        return Layout(MODES[2], ranks, tuple(held), ranks)
    if name := next((name for name, spec in specs.items() if spec.sae.activation == "batchtopk"), None):
        raise ConfigError(
            f"{name}: expected --distribute-modules for batchtopk in several processes, got replicas: it selects over "
            "a whole batch, of which each of them has a part"
        )
    return Layout(MODES[1], ranks, (whole,) * ranks, 1)
