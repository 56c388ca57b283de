"""TopK transcoders for SAELens: an inference class, and the training class that SAELens lacks.

Shapes: N tokens, D input width (``d_in``), E output width (``d_out``), L latents, K active latents; ``W_enc [D, L]``,
``W_skip [E, D]``. SAELens' trainer hands over one tensor per step: a module's inputs and outputs side by side,
[N, D + E], as :func:`pair_batches` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from ..errors import ConfigError
from .saelens_topk import FusedTopK, is_hooked, sparse

ARCHITECTURE = "fastsae_topk_transcoder"


@dataclass
class FastTopKTranscoderConfig(TranscoderConfig):
    """A TopK transcoder, with or without a skip connection."""

    k: int = 32
    skip_connection: bool = False
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass
class FastTopKTranscoderTrainingSAEConfig(TopKTrainingSAEConfig):
    """How a TopK transcoder is trained; the decoder starts at zero, and its norms are left alone."""

    k: int = 32
    d_out: int = 768
    skip_connection: bool = False
    apply_b_dec_to_input: bool = False
    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
            if getattr(self, name):
                raise ConfigError(f"{name}: expected False for a transcoder, got True")
        if self.normalize_activations != "none":
            raise ConfigError(f"normalize_activations: expected none, got {self.normalize_activations!r}")
        super().__post_init__()

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[SAEConfig]:
        return FastTopKTranscoderConfig


class FusedTranscoder(FusedTopK):
    """What the inference and the training class share."""

    W_skip: nn.Parameter | None

    def initialize_weights(self) -> None:
        Transcoder.initialize_weights(self)  # type: ignore[arg-type]
        self.W_enc = nn.Parameter(self.W_enc.data.T.contiguous().T)
        skip = self.b_dec.new_zeros(self.cfg.d_out, self.cfg.d_in)
        self.W_skip = nn.Parameter(skip) if self.cfg.skip_connection else None

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input itself: b_dec belongs to the output."""
        return self.hook_sae_input(sae_in.to(self.dtype))

    def get_activation_fn(self) -> nn.Module:
        return TopK(self.cfg.k)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Output [..., E] of dense activations [..., L], without the skip connection."""
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Predicted output [..., E] of the module's input [..., D]."""
        if is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            out = self.decode(self.encode(x))
        else:
            out = self.decode_topk(*self.encode_topk(self.process_sae_in(x)))
        return self.hook_sae_output(self.with_skip(out, x))

    def with_skip(self, out: Tensor, x: Tensor) -> Tensor:
        return out if self.W_skip is None else out + x.to(self.dtype) @ self.W_skip.mT


class FastTopKTranscoder(FusedTranscoder, Transcoder):
    """A TopK transcoder as SAELens uses them."""

    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(output [..., E], dense activations [..., L])."""
        acts = self.encode(x)
        return self.with_skip(self.decode(acts), x), acts


class FastTopKTranscoderTrainingSAE(FusedTranscoder, TopKTrainingSAE):
    """Train a TopK transcoder with SAELens' ``SAETrainer``, on batches of inputs and outputs side by side."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        nn.init.uniform_(self.W_enc.data, -(self.cfg.d_in**-0.5), self.cfg.d_in**-0.5)
        self.W_dec.data.zero_()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        widths = [self.cfg.d_in, self.cfg.d_out]
        if step_input.sae_in.shape[-1] != sum(widths):
            raise ConfigError(
                f"expected batches of inputs and outputs side by side, {' + '.join(map(str, widths))} wide, "
                f"got {list(step_input.sae_in.shape)}; make them with fastsae.compat.saelens.pair_batches"
            )
        x, target = step_input.sae_in.split(widths, dim=-1)
        if is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
            out = self.decode(feature_acts)
        else:
            x = self.process_sae_in(x)
            hidden_pre, indices = self.encode_topk(x)  # of the active latents only
            out = self.decode_topk(hidden_pre, indices)
            feature_acts = sparse(hidden_pre.detach(), indices, self.cfg.d_sae)
        out = self.with_skip(out, x)
        mse_loss = self.mse_loss_fn(out, target).sum(dim=-1).mean()
        auxk = self.calculate_topk_aux_loss(target, out, *self.dead_latents(x, step_input.dead_neuron_mask))
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=mse_loss + auxk,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": auxk},
        )


def pair_batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Batches [N, D + E] for ``SAETrainer`` from pairs of a module's inputs [N, D] and outputs [N, E]."""
    for inputs, outputs in pairs:
        yield torch.cat([inputs, outputs.to(inputs)], dim=-1)
