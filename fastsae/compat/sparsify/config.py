"""sparsify's configs: the same names, order and defaults, translated into fastsae's."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ... import config
from ...errors import ConfigError

logger = logging.getLogger("fastsae")


@dataclass(frozen=True)
class SparseCoderConfig(config.SaeConfig):
    """:class:`fastsae.SaeConfig` with sparsify's ``from_dict``, and its number of latents for AuxK."""

    def k_aux_for(self, width: int) -> int:
        return max(1, width // 2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], drop_extra_fields: bool | None = None) -> SparseCoderConfig:
        """From a ``cfg.json``'s keys; an unknown one raises :class:`ConfigError` unless ``drop_extra_fields``."""
        extra = set(values) - {f.name for f in dataclasses.fields(cls)}
        if extra and not drop_extra_fields:
            raise ConfigError(f"expected fields of {cls.__name__}, got {', '.join(sorted(extra))} too")
        return cls(**{name: value for name, value in values.items() if name not in extra})


SaeConfig = SparseCoderConfig
TranscoderConfig = partial(SparseCoderConfig, transcode=True)


@dataclass
class TrainConfig:
    """sparsify's training config, mutable as there; what fastsae does not have raises :class:`ConfigError`."""

    sae: config.SaeConfig
    batch_size: int = 32
    grad_acc_steps: int = 1
    micro_acc_steps: int = 1
    loss_fn: Literal["ce", "fvu", "kl"] = "fvu"
    optimizer: Literal["adam", "muon", "signum"] = "signum"
    lr: float | None = None
    lr_warmup_steps: int = 1000
    k_decay_steps: int = 0
    auxk_alpha: float = 0.0
    dead_feature_threshold: int = 10_000_000
    exclude_tokens: list[int] = field(default_factory=list)
    hookpoints: list[str] = field(default_factory=list)
    init_seeds: list[int] = field(default_factory=lambda: [0])
    layers: list[int] = field(default_factory=list)
    layer_stride: int = 1
    distribute_modules: bool = False
    save_every: int = 1000
    save_best: bool = False
    finetune: str | None = None
    log_to_wandb: bool = True
    run_name: str | None = None
    wandb_log_frequency: int = 1
    save_dir: str = "checkpoints"

    def __post_init__(self) -> None:
        self.to_fastsae()  # checked at birth

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_fastsae(self) -> config.TrainConfig:
        """The same run as a :class:`fastsae.TrainConfig`; raises :class:`ConfigError` where there is no counterpart."""
        known = {f.name for f in dataclasses.fields(config.TrainConfig)}
        given: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in known:
                given[f.name] = tuple(value) if isinstance(value, list) else value
            elif f.name not in _TRANSLATED and value != f.default:
                raise ConfigError(f"{f.name}: this version of fastsae does only {f.default!r}, got {value!r}")
        given |= {"run_name": self.run_name or "unnamed", "log_every": self.wandb_log_frequency}
        return config.TrainConfig(**given, log_to=("wandb",) if self._logs_to_wandb() else ())

    def _logs_to_wandb(self) -> bool:
        """As sparsify does: where wandb is not installed, the run goes on without it."""
        if self.log_to_wandb and importlib.util.find_spec("wandb") is None:
            logger.info("wandb is not installed: numbers go to metrics.jsonl only; pip install wandb")
            self.log_to_wandb = False
        return self.log_to_wandb


_TRANSLATED = {"log_to_wandb", "wandb_log_frequency"}
