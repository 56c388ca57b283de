"""The ranks that hold one coder's latents, for :mod:`fastsae_kernels.split`, on a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..coder_config import SaeConfig
from ..errors import ConfigError
from .world import World, peers_needed


class LatentPeers:
    """``group`` of processes; this one holds the latents ``begin ... end - 1`` of ``bounds[-1]``."""

    def __init__(self, world: World, group: Any, bounds: list[int]):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bounds, self.begin, self.end = bounds, bounds[self.rank], bounds[self.rank + 1]
        self.num_latents = bounds[-1]
        self.group, self._world = group, world

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's ``part``, of one shape: [P, ...]."""
        parts = part.new_empty((self.size, *part.shape))
        self._world.sent += part.nbytes
        with peers_needed(self._world):
            dist.all_gather(list(parts), part.contiguous(), group=self.group)
        return parts

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place where memory is contiguous; the same bits everywhere."""
        part = part.contiguous()
        self._world.sent += part.nbytes
        with peers_needed(self._world):
            dist.all_reduce(part, group=self.group)
        return part


def latent_bounds(cfg: SaeConfig, d_in: int, ranks: int) -> list[int]:
    """Where each rank's latents begin, and the end: shares differ by at most one latent, or GroupMax group.

    Raises :class:`ConfigError` where a rank would have none.
    """
    if cfg.activation == "batchtopk" or cfg.matryoshka_widths:
        got = "batchtopk" if cfg.activation == "batchtopk" else "Matryoshka widths"
        raise ConfigError(
            f"distribute_latents: expected topk or groupmax of one width, got {got}, whose step needs all latents of a "
            "coder; use --distribute-modules"
        )
    num_latents = cfg.latents_for(d_in)
    units = num_latents if cfg.activation == "topk" else cfg.k
    if units < ranks:
        what = "latents" if cfg.activation == "topk" else "groups (k) of GroupMax"
        raise ConfigError(
            f"distribute_latents: expected at least one of a coder's {what} for each of {ranks} ranks, got {units}; "
            "lower --distribute-latents"
        )
    return [units * rank // ranks * (num_latents // units) for rank in range(ranks + 1)]
