"""Which strategy a run's config asks for."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from .reduction import GradientReduction
from .strategy import Replicas, Strategy
from .world import World


def make_strategy(cfg: TrainConfig, world: World) -> Strategy:
    """One process: everything in it. Several: replicas that sum their gradients."""
    if world.size == 1:
        return Strategy(world)
    return Replicas(world, GradientReduction(world, getattr(torch, cfg.grad_reduce_dtype)))
