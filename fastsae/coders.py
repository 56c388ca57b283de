"""Which coders a run trains, where they sit, and how they start.

Shapes: N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .coder_config import SaeConfig
from .config import TrainConfig
from .errors import ConfigError, HookpointError
from .hookpoints import Hookpoint, layer_hookpoints, listing, resolve_hookpoints
from .overrides import coder_name, parse_override, resolve_variants
from .sae import FastSae
from .shards import probe_whole

logger = logging.getLogger("fastsae")

Mean = Callable[[Tensor], Tensor]
"""The mean of rows [N, D] -> [D] float32, over this batch, and the other ranks' parts of it."""


def find_hookpoints(model: PreTrainedModel, cfg: TrainConfig) -> dict[str, Hookpoint]:
    """The hookpoints that ``cfg`` asks for, by name, each checked to carry what a coder needs."""
    names = resolve_hookpoints(model, cfg.hookpoints) if cfg.hookpoints else layer_hookpoints(model, cfg.layers)
    names = names[:: cfg.layer_stride]
    found = probe_whole(model, names)
    silent = [name for name in names if name not in found]
    if exact := [name for name in silent if not found or name in cfg.hookpoints]:
        raise HookpointError(
            f"{exact[0]}: expected a module whose output is a float tensor [..., width], got none when the model ran; "
            f"list what there is with: {listing(model)}"
        )
    if silent:  # met by a wildcard
        logger.info("left out %d modules that the model's forward gives no activations of: %s", len(silent), silent[0])
    for at in found.values():
        if cfg.sae.transcode:
            check_transcoder(at)
        if at.calls > 1:
            logger.info(
                "%s: the model calls it %d times in a forward (shared weights); one coder is trained on all of them",
                at.name, at.calls,
            )  # fmt: skip
    return found


def check_transcoder(at: Hookpoint) -> None:
    """Raise :class:`HookpointError` where a transcoder cannot sit."""
    if at.d_in is None:
        raise HookpointError(
            f"{at.name}: a transcoder expects a module whose input is a float tensor, got none; "
            "choose another hookpoint, such as the whole MLP"
        )


class CoderSpec(NamedTuple):
    """A coder that a run trains."""

    d_in: int
    d_out: int
    sae: SaeConfig
    seed: int

    @property
    def num_latents(self) -> int:
        return self.sae.latents_for(self.d_in)

    @property
    def parameters(self) -> int:
        """Numbers in the two matrices."""
        return (self.d_in + self.d_out) * self.num_latents


def coder_specs(cfg: TrainConfig, hookpoints: dict[str, Hookpoint]) -> dict[str, CoderSpec]:
    """A coder per hookpoint, variant (``cfg.set``) and seed: ``HOOK``, ``HOOK/seed1``, ``HOOK/k32/seed1``.

    Raises :class:`ConfigError` for one that cannot be.
    """
    specs = {}
    variants = resolve_variants(cfg.sae, map(parse_override, cfg.set), hookpoints)
    for name, hookpoint in hookpoints.items():
        for variant, sae in variants[name].items():
            for seed in cfg.init_seeds:
                seeded = seed if len(cfg.init_seeds) > 1 else None
                d_in = hookpoint.d_in if sae.transcode else hookpoint.d_out
                assert d_in is not None  # check_transcoder has seen it
                specs[coder_name(name, variant, seeded)] = CoderSpec(d_in, hookpoint.d_out, sae, seed)
                try:
                    sae.latents_for(d_in)
                except ConfigError as error:
                    raise ConfigError(f"{name} (width {d_in}): {error}") from None
    return specs


def make_coders(
    specs: dict[str, CoderSpec], device: torch.device, make: Callable[[CoderSpec], FastSae]
) -> dict[str, FastSae]:
    """The coders on ``device``, each made by ``make(spec)`` under its seed."""
    coders = {}
    for name, spec in specs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            coders[name] = make(spec).to(device)
    return coders


def batch_mean(rows: Tensor) -> Tensor:  # [N, D] -> [D]
    return rows.float().mean(0)
