"""sparsify's ``Trainer`` on fastsae's: the same constructor, ``fit``, and ``saes``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ... import config, trainer
from ...sae import FastSae
from .config import TrainConfig


class Trainer(trainer.Trainer):
    """Train coders as ``cfg`` says, sparsify's or fastsae's own; see :class:`fastsae.Trainer`.

    A run is written to ``save_dir/run_name`` (``unnamed``), which must not hold another run already.
    """

    def __init__(self, cfg: TrainConfig | config.TrainConfig, dataset: Any, model: PreTrainedModel):
        super().__init__(cfg.to_fastsae() if isinstance(cfg, TrainConfig) else cfg, dataset, model)

    @property
    def saes(self) -> dict[str, FastSae]:
        """The coders by name."""
        return self.coders

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self.step


SaeTrainer = Trainer
