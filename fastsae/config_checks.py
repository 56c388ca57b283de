"""Options of a training run that contradict each other: each is refused by name, with the way out."""

from __future__ import annotations

from typing import Any

from .coder_config import SaeConfig
from .errors import ConfigError


def check_together(cfg: Any) -> None:
    """Raise :class:`ConfigError` for the first option of a TrainConfig that does not go with another."""
    if cfg.max_grad_norm is not None and cfg.optimizer == "signum":
        raise ConfigError("max_grad_norm: expected another optimizer with it, got signum, which takes signs only")
    if cfg.k_decay_steps and cfg.sae.activation == "groupmax":
        raise ConfigError("k_decay_steps: expected topk, got groupmax, whose k is its number of groups")
    if cfg.distribute_latents > 1:
        _check_latent_slices(cfg)
    if cfg.cuda_graph:
        _check_cuda_graph(cfg)
    if cfg.loss_fn != "fvu":
        _check_run_end_to_end(cfg)
    if cfg.shuffle_tokens is not None and cfg.activations is None:
        raise ConfigError(
            "shuffle_tokens: expected --activations FOLDER with it, got none: single tokens can be shuffled in a "
            "cache only (fastsae cache writes one); --shuffle-seed is the order of whole sequences"
        )
    if cfg.layers and cfg.hookpoints:
        raise ConfigError("expected layers or hookpoints, got both; drop one of them")
    if cfg.layers and cfg.layer_stride != 1:
        raise ConfigError("expected layers or layer_stride, got both; drop one of them")


def _check_latent_slices(cfg: Any) -> None:
    if cfg.distribute_modules:
        raise ConfigError("expected distribute_modules or distribute_latents, got both; drop one of them")
    if cfg.sae.multi_topk and cfg.sae.activation != "topk":
        raise ConfigError("distribute_latents: expected topk with Multi-TopK, got groupmax; drop --multi-topk")
    if cfg.optimizer == "bnb_adam8bit":
        raise ConfigError("distribute_latents: expected another optimizer, got bnb_adam8bit; use adam8bit")
    if cfg.optimizer == "muon":
        raise ConfigError(
            "distribute_latents: expected another optimizer, got muon, whose update of a row depends on all rows; "
            "use adam, or --distribute-modules"
        )


def _check_cuda_graph(cfg: Any) -> None:
    """A graph holds the optimizer's step, and can have nothing in it that differs from step to step."""
    for name, plain in (
        ("grad_acc_steps", 1), ("micro_acc_steps", 1), ("max_grad_norm", None), ("loss_fn", "fvu"),
        ("distribute_latents", 1), ("exclude_tokens", ()),
    ):  # fmt: skip
        if getattr(cfg, name) != plain:
            raise ConfigError(f"cuda_graph: expected {name} {plain!r} with it, got {getattr(cfg, name)!r}")
    if cfg.optimizer not in ("adam", "adam8bit", "signum"):
        raise ConfigError(f"cuda_graph: expected adam, adam8bit or signum with it, got {cfg.optimizer}")
    if cfg.sae.activation == "batchtopk" or cfg.sae.matryoshka_widths:
        raise ConfigError("cuda_graph: expected topk or groupmax of one width with it")


def _check_run_end_to_end(cfg: Any) -> None:
    for name, plain, way_out in (
        ("micro_acc_steps", 1, "lower batch_size and raise grad_acc_steps"),
        ("token_buffer", 0, "leave it out: the model needs its tokens in place"),
        ("distribute_modules", False, "start replicas (torchrun without it)"),
        ("distribute_latents", 1, "start replicas (torchrun without it)"),
        ("init_seeds", cfg.init_seeds[:1], "train them in runs of their own: one coder is grafted per hookpoint"),
    ):
        if getattr(cfg, name) != plain:
            came = f"{getattr(cfg, name)!r} and {cfg.loss_fn}"
            raise ConfigError(f"{name}: expected {plain!r}, or loss_fn fvu, got {came}; {way_out}")
    check_end_to_end(cfg.sae, cfg.loss_fn)


def check_end_to_end(sae: SaeConfig, loss_fn: str) -> None:
    """Raise :class:`ConfigError` for coders that the model's own losses do not train."""
    for name, plain in (("multi_topk", False), ("matryoshka_widths", ())):
        if getattr(sae, name) != plain:
            raise ConfigError(f"{name}: expected loss_fn fvu, whose parts these are, got {loss_fn}; drop one of them")
    if sae.activation == "batchtopk":
        raise ConfigError(f"activation: expected topk or groupmax with {loss_fn}, got batchtopk; or use loss_fn fvu")
