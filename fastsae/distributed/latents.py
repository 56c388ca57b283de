"""``--distribute-latents R``: the latents of every coder are split over R neighbouring ranks; such groups are replicas.

Shapes: N tokens of a batch on this rank, M tokens on its group, D width in, E width out.

Each rank runs the model on its own part of a batch; a group's ranks give each other their activations, and take a step
on all M tokens together (:mod:`fastsae_kernels.split`). Where there are several groups, gradients of equal slices are
summed over them, as between replicas.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..coders import CoderSpec
from ..errors import ConfigError, HookpointError
from ..metrics import TrainingMetrics
from ..sae import FastSae
from .exchange import Exchange
from .latent_peers import LatentPeers, latent_bounds
from .latent_slice import LatentSlice
from .reduction import GradientReduction
from .strategy import Replicas, Strategy, Train
from .world import World


class Latents(Strategy):
    """``ranks`` hold a coder together; of such groups there are ``world.size // ranks``.

    Raises :class:`ConfigError` where the world cannot be divided into such groups.
    """

    def __init__(self, world: World, ranks: int, device: torch.device, dtype: torch.dtype = torch.float32):
        super().__init__(world)
        if world.size % ranks:
            raise ConfigError(
                f"distribute_latents: expected a divisor of the number of processes, {world.size}, got {ranks}"
            )
        mesh = init_device_mesh(device.type, (world.size // ranks, ranks), mesh_dim_names=("data", "latents"))
        self._group = mesh.get_group("latents")
        self._members = [int(rank) for rank in mesh["latents"].mesh.flatten()]
        self._exchange = Exchange(world, self._members)
        replicas = World(mesh.get_local_rank("data"), mesh.size(0), group=mesh.get_group("data"))
        self._data = Replicas(replicas, GradientReduction(replicas, dtype)) if replicas.size > 1 else Strategy(replicas)
        self.fuses, self.all_sum = self._data.fuses, self._data.all_sum
        self._counts: deque[list[int]] = deque()  # the members' tokens, of each batch to come

    def make(self, spec: CoderSpec, implementation: str) -> FastSae:
        bounds = latent_bounds(spec.sae, spec.d_in, len(self._members))
        peers = LatentPeers(self.world, self._group, bounds)
        return LatentSlice(spec.d_in, spec.sae, peers=peers, d_out=spec.d_out, implementation=implementation)

    def tokens(self, counts: list[int], signal: int) -> tuple[list[int], int]:
        every = self.world.all_gather_sizes([signal, *counts])
        signals, *batches = zip(*every, strict=True)
        self._counts = deque([batch[rank] for rank in self._members] for batch in batches if sum(batch))
        return [sum(batch) for batch in batches], max(signals)

    def deliver(self, hookpoint: str, x: Tensor, y: Tensor, train: Train) -> None:
        counts, me = self._counts[0], self._members.index(self.world.rank)
        if len(y) != counts[me]:
            raise HookpointError(
                f"{hookpoint}: --distribute-latents expects activations of one row per token, "
                f"got {len(y)} rows of {counts[me]} tokens; train it in a run of its own"
            )
        coming = self._exchange.start(y, counts, self._members)
        inputs = coming if x is y else self._exchange.start(x, counts, self._members)
        assert coming is not None
        assert inputs is not None
        rows = coming.wait()
        train(hookpoint, rows if x is y else inputs.wait(), rows)

    def end_batch(self, train: Train) -> None:
        self._exchange.finish()
        self._counts.popleft()

    def mean_of(self, rows: Tensor) -> Tensor:
        return self._data.mean_of(rows)

    def variance(self, y: Tensor) -> tuple[Tensor, float | Tensor]:
        return self._data.variance(y)

    @property
    def part(self) -> tuple[int, int]:
        ranks = len(self._members)
        number = self._members.index(self.world.rank)
        return (number if self._data.world.first else ranks), ranks

    def reduce(self, coders: dict[str, FastSae], metrics: dict[str, TrainingMetrics]) -> None:
        self._data.reduce(coders, metrics)
