"""A training run's config: frozen, a sentence under each field, checked at birth. The command line is made from it.

The sentences are read back by :func:`fastsae.fields.field_docs` for ``--help``, so there is one list of options.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .coder_config import SaeConfig
from .config_checks import check_together
from .fields import check_types, require


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run over one model pass; the names are sparsify's."""

    sae: SaeConfig = field(default_factory=SaeConfig)
    """The coders to train."""

    batch_size: int = 32
    """Sequences per batch."""

    grad_acc_steps: int = 1
    """Batches whose gradients are summed into one optimizer step."""

    micro_acc_steps: int = 1
    """Chunks that the activations of a batch are trained in, to save memory."""

    loss_fn: Literal["fvu", "ce", "kl"] = "fvu"
    """What is lowered: fvu, or of the model with coders in it the cross-entropy (ce) or KL from that without (kl)."""

    optimizer: Literal["adam", "adam8bit", "signum", "muon", "bnb_adam8bit"] = "adam"
    """The optimizer; adam8bit keeps its moments in 8 bits, signum is schedule-free, muon makes updates orthogonal."""

    lr: float | None = None
    """Learning rate; by default 2e-4 (signum: 5e-3) / sqrt(latents / 2**14), for muon 2e-3."""

    max_grad_norm: float | None = None
    """Scale each coder's gradient down to this norm in every step; by default it is left as it is."""

    distribute_modules: bool = False
    """Let each of several processes (torchrun) own some of the coders, instead of a copy of all."""

    distribute_latents: int = 1
    """Processes (torchrun) that each coder's latents are split over, for coders larger than one device."""

    grad_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which several processes (torchrun) sum the gradients of their coders' matrices."""

    k_decay_steps: int = 0
    """Optimizer steps in which the number of active latents falls linearly from 10 times the width to k."""

    lr_warmup_steps: int = 1000
    """Optimizer steps of linear warm-up, at most a tenth of the run; then linear decay to the last step."""

    auxk_alpha: float = 0.0
    """Weight of the AuxK loss, which revives dead latents."""

    dead_feature_threshold: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""

    exclude_tokens: tuple[int, ...] = ()
    """Token ids that are not trained on; on the command line also by name: bos, eos, pad, special."""

    hookpoints: tuple[str, ...] = ()
    """Modules to train on: names or wildcards; by default every layer's residual stream."""

    layers: tuple[int, ...] = ()
    """Layers whose residual stream to train on, instead of hookpoints."""

    set: tuple[str, ...] = ()
    """Other coders where a wildcard matches: "PATTERN:k=64,expansion_factor=16"; k=32|64 trains one of each."""

    activations: str | None = None
    """Folder that fastsae cache wrote, to train on instead of running the model."""

    shuffle_tokens: int | None = None
    """Seed of a random order of the tokens of --activations; by default they come as the model would give them."""

    token_buffer: int = 0
    """Tokens per hookpoint held in memory to shuffle them, so that a batch mixes many sequences; 0: as they come."""

    finetune: str | None = None
    """Saved coders to go on training from: a folder or a hub id."""

    layer_stride: int = 1
    """Keep every n-th of the hookpoints."""

    init_seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation; with several, one coder per hookpoint and seed."""

    implementation: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Which code computes the coders; auto chooses by device and says why."""

    cuda_graph: bool = False
    """Record each coder's step as a CUDA graph and replay it: faster for small coders, takes some memory more."""

    held_out: int = 64
    """Sequences kept out of training to measure the coders at the end, at most a twentieth of all."""

    save_every: int = 1000
    """Optimizer steps between checkpoints, which --resume goes on from."""

    keep_last: int = 1
    """Checkpoints whose coders are kept: the newest in the run's folder, more of them under steps/."""

    save_best: bool = False
    """Measure the held-out FVU at every checkpoint, and keep each coder's best under best/."""

    log_every: int = 10
    """Optimizer steps between records in metrics.jsonl."""

    log_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Trackers to log to, beside metrics.jsonl: wandb, tensorboard."""

    save_dir: str = "checkpoints"
    """Folder that runs are saved in."""

    run_name: str | None = None
    """Name of the run and of its folder; by default the model's name and the time."""

    def __post_init__(self) -> None:
        for name in ("exclude_tokens", "hookpoints", "layers", "init_seeds", "log_to", "set"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        for name in (
            "batch_size", "grad_acc_steps", "micro_acc_steps", "layer_stride", "save_every", "keep_last", "log_every",
            "distribute_latents",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in (
            "lr_warmup_steps",
            "auxk_alpha",
            "dead_feature_threshold",
            "held_out",
            "k_decay_steps",
            "token_buffer",
        ):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        require(self.lr is None or self.lr > 0, "lr", "a positive number", self.lr)
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "a positive number",
            self.max_grad_norm,
        )  # fmt: skip
        require(len(set(self.init_seeds)) == len(self.init_seeds) > 0, "init_seeds", "distinct seeds", self.init_seeds)
        check_together(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
