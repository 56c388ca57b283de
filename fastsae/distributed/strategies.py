"""Which strategy a run's config asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ..coders import CoderSpec
from ..config import TrainConfig
from ..errors import ConfigError
from .balance import describe, owners
from .latents import Latents
from .modules import Modules
from .reduction import GradientReduction
from .shared_model import SharedLatents, SharedModules
from .strategy import Replicas, Strategy
from .world import World

logger = logging.getLogger("fastsae")


def make_strategy(
    cfg: TrainConfig, world: World, specs: Mapping[str, CoderSpec], device: torch.device, *, shared: bool = False
) -> Strategy:
    """One process: all in it. Several: replicas that sum their gradients, unless ``cfg`` asks for another way.

    ``shared``: they run one model together, and share the coders out, or every coder's latents.
    """
    if shared:
        return _of_shared_model(cfg, world, specs, device)
    dtype = getattr(torch, cfg.grad_reduce_dtype)
    if cfg.token_buffer and world.size > 1 and not cfg.distribute_modules:
        raise ConfigError(
            "token_buffer: expected one process, or --distribute-modules, got several that would each hold tokens of "
            "their own, which no checkpoint keeps; leave it out, or shuffle a cache (--activations, --shuffle-tokens)"
        )
    if cfg.distribute_latents > 1:
        if world.size == 1:
            raise ConfigError(
                f"distribute_latents: expected {cfg.distribute_latents} processes or a multiple, got one; start with: "
                f"torchrun --nproc-per-node {cfg.distribute_latents} -m fastsae train ..."
            )
        return Latents(world, cfg.distribute_latents, device, dtype)
    if world.size == 1:
        return Strategy(world)
    if cfg.distribute_modules:
        return Modules(world, _owners(world, specs))
    if name := next((name for name, spec in specs.items() if spec.sae.activation == "batchtopk"), None):
        raise ConfigError(
            f"{name}: expected --distribute-modules for batchtopk in several processes, got replicas: it selects over "
            "a whole batch, of which each of them has a part"
        )
    return Replicas(world, GradientReduction(world, dtype))


def _of_shared_model(cfg: TrainConfig, world: World, specs: Mapping[str, CoderSpec], device: torch.device) -> Strategy:
    if cfg.distribute_latents == 1:
        return SharedModules(world, _owners(world, specs))
    if cfg.distribute_latents != world.size:
        raise ConfigError(
            f"distribute_latents: expected {world.size} with --tp-plan, all processes that run the model together, "
            f"got {cfg.distribute_latents}; or leave it out, and each of them owns some of the coders"
        )
    if cfg.token_buffer:
        raise ConfigError(
            "token_buffer: expected --tp-plan without --distribute-latents, got both, whose processes would each hold "
            "tokens of their own; leave one of the two out"
        )
    return SharedLatents(world, device)


def _owners(world: World, specs: Mapping[str, CoderSpec]) -> dict[str, int]:
    """Which rank owns each coder, logged once."""
    costs = {name: spec.parameters for name, spec in specs.items()}
    owner = owners(costs, world.size)
    if world.first:
        for line in describe(costs, owner, world.size):
            logger.info("%s", line)
    return owner
