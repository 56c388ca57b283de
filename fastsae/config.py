"""Frozen configs, a sentence under each field, checked at birth. The command line is made from them.

The sentences are read back by :func:`fastsae.fields.field_docs` for ``--help``, so there is one list of options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from .errors import ConfigError
from .fields import check_types, require


@dataclass(frozen=True)
class SaeConfig:
    """Configuration of one sparse coder; the names are sparsify's."""

    activation: Literal["topk", "groupmax", "batchtopk"] = "topk"
    """How latents are selected: the k largest, the largest of each of k groups, or k per token on a batch's average."""

    expansion_factor: int = 32
    """Number of latents as a multiple of the input width."""

    normalize_decoder: bool = True
    """Keep every decoder row at unit norm (SAEs only; a transcoder's decoder starts at zero)."""

    num_latents: int = 0
    """Number of latents; 0 means width times expansion factor."""

    k: int = 32
    """Number of active latents per token."""

    multi_topk: bool = False
    """Add the Multi-TopK loss: 1/8 of the FVU reached with 4k latents."""

    skip_connection: bool = False
    """Add a linear map from the input to the output."""

    transcode: bool = False
    """Predict a module's output from its input, instead of reconstructing its output."""

    matryoshka_widths: tuple[int, ...] = ()
    """Numbers of first latents that each reconstruct by themselves, beside all (Matryoshka); the loss is the mean."""

    def __post_init__(self) -> None:
        if isinstance(self.matryoshka_widths, list):
            object.__setattr__(self, "matryoshka_widths", tuple(self.matryoshka_widths))
        check_types(self)
        widths = self.matryoshka_widths
        ascending = list(widths) == sorted({0, *widths})[1:]
        require(ascending, "matryoshka_widths", "ascending numbers of latents above 0", widths)
        require(self.k >= 1, "k", "at least 1", self.k)
        require(self.expansion_factor >= 1, "expansion_factor", "at least 1", self.expansion_factor)
        require(self.num_latents >= 0, "num_latents", "0 (derived) or more", self.num_latents)
        if self.multi_topk and (self.activation == "batchtopk" or widths):
            other = "batchtopk, whose k is a mean" if self.activation == "batchtopk" else "Matryoshka widths"
            raise ConfigError(f"multi_topk: expected topk or groupmax of one width with it, got {other}; drop one")
        if self.num_latents:
            self.check_latents(self.num_latents)

    def prefixes_for(self, num_latents: int) -> tuple[int, ...]:
        """Matryoshka's prefixes, the last of them all ``num_latents``; () without any."""
        widths = self.matryoshka_widths
        return widths if not widths or widths[-1] == num_latents else (*widths, num_latents)

    def latents_for(self, d_in: int) -> int:
        """Number of latents on a width of ``d_in``; raises :class:`ConfigError` where k does not fit."""
        num_latents = self.num_latents or d_in * self.expansion_factor
        self.check_latents(num_latents)
        return num_latents

    def k_aux_for(self, width: int) -> int:
        """Dead latents that AuxK takes per token on a reconstruction of ``width``.

        The power of two closest to half of it (Gao et al. 2024, arXiv 2406.04093, appendix A.2: 512 for GPT-2's 768).
        """
        return 2 ** max(0, round(math.log2(width / 2)))

    def output_width(self, d_in: int, d_out: int | None) -> int:
        """``d_out``, by default ``d_in``; raises :class:`ConfigError` for an autoencoder with two widths."""
        if d_out is None or d_out == d_in:
            return d_in
        if not self.transcode:
            raise ConfigError(
                f"d_out: expected {d_in}, the width that an autoencoder encodes, got {d_out}; "
                "only a transcoder (transcode=True) has two widths"
            )
        return d_out

    def check_latents(self, num_latents: int) -> None:
        needed = 4 * self.k if self.multi_topk else self.k
        what = "4k (Multi-TopK)" if self.multi_topk else "k"
        if needed > num_latents:
            raise ConfigError(
                f"expected {what} <= number of latents, got {what} = {needed} and {num_latents} latents; "
                "lower --k or raise --expansion-factor or --num-latents"
            )
        if self.matryoshka_widths and self.matryoshka_widths[-1] > num_latents:
            raise ConfigError(
                f"matryoshka_widths: expected at most the {num_latents} latents there are, got "
                f"{self.matryoshka_widths[-1]}; lower it or raise --expansion-factor or --num-latents"
            )
        if self.activation == "groupmax" and num_latents % self.k:
            raise ConfigError(
                f"groupmax expects a number of latents divisible by k, got {num_latents} latents and k = {self.k}; "
                f"try --k {_nearest_divisor(num_latents, self.k)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SaeConfig:
        """From a ``cfg.json``'s keys: unknown ones are ignored, missing ones take the defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


TranscoderConfig = partial(SaeConfig, transcode=True)


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
        if self.max_grad_norm is not None and self.optimizer == "signum":
            raise ConfigError("max_grad_norm: expected another optimizer with it, got signum, which takes signs only")
        if self.k_decay_steps and self.sae.activation == "groupmax":
            raise ConfigError("k_decay_steps: expected topk, got groupmax, whose k is its number of groups")
        require(len(set(self.init_seeds)) == len(self.init_seeds) > 0, "init_seeds", "distinct seeds", self.init_seeds)
        if self.distribute_latents > 1:
            self._check_latent_slices()
        if self.cuda_graph:
            self._check_cuda_graph()
        if self.loss_fn != "fvu":
            self._check_end_to_end()
        if self.shuffle_tokens is not None and self.activations is None:
            raise ConfigError(
                "shuffle_tokens: expected --activations FOLDER with it, got none: single tokens can be shuffled in a "
                "cache only (fastsae cache writes one); --shuffle-seed is the order of whole sequences"
            )
        if self.layers and self.hookpoints:
            raise ConfigError("expected layers or hookpoints, got both; drop one of them")
        if self.layers and self.layer_stride != 1:
            raise ConfigError("expected layers or layer_stride, got both; drop one of them")

    def _check_latent_slices(self) -> None:
        if self.distribute_modules:
            raise ConfigError("expected distribute_modules or distribute_latents, got both; drop one of them")
        if self.sae.multi_topk and self.sae.activation != "topk":
            raise ConfigError("distribute_latents: expected topk with Multi-TopK, got groupmax; drop --multi-topk")
        if self.optimizer == "bnb_adam8bit":
            raise ConfigError("distribute_latents: expected another optimizer, got bnb_adam8bit; use adam8bit")
        if self.optimizer == "muon":
            raise ConfigError(
                "distribute_latents: expected another optimizer, got muon, whose update of a row depends on all rows; "
                "use adam, or --distribute-modules"
            )

    def _check_cuda_graph(self) -> None:
        """A graph holds the optimizer's step, and can have nothing in it that differs from step to step."""
        for name, plain in (
            ("grad_acc_steps", 1), ("micro_acc_steps", 1), ("max_grad_norm", None), ("loss_fn", "fvu"),
            ("distribute_latents", 1), ("exclude_tokens", ()),
        ):  # fmt: skip
            if getattr(self, name) != plain:
                raise ConfigError(f"cuda_graph: expected {name} {plain!r} with it, got {getattr(self, name)!r}")
        if self.optimizer not in ("adam", "adam8bit", "signum"):
            raise ConfigError(f"cuda_graph: expected adam, adam8bit or signum with it, got {self.optimizer}")
        if self.sae.activation == "batchtopk" or self.sae.matryoshka_widths:
            raise ConfigError("cuda_graph: expected topk or groupmax of one width with it")

    def _check_end_to_end(self) -> None:
        for name, plain, way_out in (
            ("micro_acc_steps", 1, "lower batch_size and raise grad_acc_steps"),
            ("token_buffer", 0, "leave it out: the model needs its tokens in place"),
            ("distribute_modules", False, "start replicas (torchrun without it)"),
            ("distribute_latents", 1, "start replicas (torchrun without it)"),
            ("init_seeds", self.init_seeds[:1], "train them in runs of their own: one coder is grafted per hookpoint"),
        ):
            if getattr(self, name) != plain:
                came = f"{getattr(self, name)!r} and {self.loss_fn}"
                raise ConfigError(f"{name}: expected {plain!r}, or loss_fn fvu, got {came}; {way_out}")
        check_end_to_end(self.sae, self.loss_fn)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_end_to_end(sae: SaeConfig, loss_fn: str) -> None:
    """Raise :class:`ConfigError` for coders that the model's own losses do not train."""
    for name, plain in (("multi_topk", False), ("matryoshka_widths", ())):
        if getattr(sae, name) != plain:
            raise ConfigError(f"{name}: expected loss_fn fvu, whose parts these are, got {loss_fn}; drop one of them")
    if sae.activation == "batchtopk":
        raise ConfigError(f"activation: expected topk or groupmax with {loss_fn}, got batchtopk; or use loss_fn fvu")


@dataclass(frozen=True)
class EncodeConfig:
    """What to show of a text's latents."""

    text: str = ""
    """The text to encode."""

    hookpoints: tuple[str, ...] = ()
    """Coders to take: names or wildcards; by default all."""

    top: int = 5
    """Latents to show per token, the strongest first."""

    json: bool = False
    """Print JSON instead of tables."""

    force: bool = False
    """Encode with coders on a model or hookpoint that they were not trained on."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.text != "", "text", 'some text: --text "..."', self.text)
        require(self.top >= 1, "top", "at least 1", self.top)


def _nearest_divisor(n: int, k: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - k))
