"""What work on a coder makes for itself, by implementation: the formulas of ``fastsae_kernels``, for a run's coders.

Shapes: N tokens, D width in, E width out, L latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from fastsae_kernels.step_sizes import Sizes

from ..coders import CoderSpec
from ..config import TrainConfig

_MODULES = {"cpu": "cpu_memory", "triton": "gpu_memory", "reference": "reference_memory"}


@dataclass(frozen=True)
class Work:
    """Counts bytes for coders that ``implementation`` computes on activations of ``dtype``."""

    implementation: str
    dtype: torch.dtype
    cfg: TrainConfig

    def scratch(self, spec: CoderSpec, latents: int, tokens: int) -> int:
        """Kept from one step to the next, shared by all coders."""
        return self._module.scratch(self._sizes(spec, latents, tokens))

    def step(self, spec: CoderSpec, latents: int, tokens: int, parts: int, *, in_place: bool) -> int:
        """A training step on ``tokens``, in so many ``parts``, beyond its inputs and :meth:`scratch`."""
        whole, part = self._sizes(spec, latents, tokens), self._sizes(spec, latents, -(-tokens // parts))
        rule = self.cfg.optimizer if in_place else None
        return max(self._module.variance(whole), self._module.step(part, rule))

    def forward(self, spec: CoderSpec, latents: int, tokens: int) -> int:
        """A forward without gradients, on held-out tokens."""
        return self._module.forward(self._sizes(spec, latents, tokens))

    @property
    def _module(self) -> ModuleType:
        return import_module(f"fastsae_kernels.{_MODULES[self.implementation]}")  # Triton may not be installed

    def _sizes(self, spec: CoderSpec, latents: int, tokens: int) -> Sizes:
        sae = spec.sae
        shown = 4 if sae.multi_topk else 2 if sae.activation == "batchtopk" else 1
        return Sizes(
            tokens, spec.d_in, spec.d_out, latents, min(latents, shown * sae.k), self.dtype, centered=not sae.transcode,
            skip=sae.skip_connection, wide=sae.multi_topk, groupmax=sae.activation == "groupmax",
            unit_rows=sae.normalize_decoder and not sae.transcode, prefixes=len(sae.prefixes_for(latents)),
        )  # fmt: skip
