"""SAELens' TopK classes with fastsae's kernels inside: same weights, files, hook points and losses.

Shapes: ``...`` or N tokens, D width (``d_in``), L latents (``d_sae``), K active latents (``k``); ``W_enc [D, L]``.

While something is hooked to the pre-activations, or to the activations in a place where no dense ones are made, the
library's own dense code runs instead, so that all six hook points fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from .. import ops

ARCHITECTURE = "fastsae_topk"


@dataclass
class FastTopKSAEConfig(TopKSAEConfig):
    """SAELens' TopK config under the name that fastsae's class is registered by."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass
class FastTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """SAELens' TopK training config; ``use_sparse_activations`` has no meaning here, nothing dense is made."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[SAEConfig]:
        return FastTopKSAEConfig


class FusedTopK(nn.Module):
    """What the inference and the training class share: TopK encoding and sparse decoding of SAELens' weights."""

    cfg: Any
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    @property
    def _rescales(self) -> bool:
        return getattr(self.cfg, "rescale_acts_by_decoder_norm", False)

    def encode(self, x: Tensor) -> Tensor:
        """Activations, dense, [..., L], of x [..., D]."""
        if is_hooked(self.hook_sae_acts_pre):
            return super().encode(x)  # type: ignore[misc]
        acts, indices = self.encode_topk(self.process_sae_in(x))
        return self.hook_sae_acts_post(dense(acts, indices, self.cfg.d_sae))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., D]; dense activations are made only where they are hooked or an error term is wanted."""
        if self.use_error_term or is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            return super().forward(x)
        return self.hook_sae_output(self.decode_topk(*self.encode_topk(self.process_sae_in(x))))

    def encode_topk(self, sae_in: Tensor) -> tuple[Tensor, Tensor]:
        """(activations [..., K], indices [..., K]) of processed inputs [..., D]."""
        weight, bias = self.W_enc.mT, self.b_enc
        if self._rescales:
            norms = self.W_dec.norm(dim=-1)
            weight, bias = weight * norms[:, None], bias * norms
        if torch.is_autocast_enabled(sae_in.device.type):
            sae_in = sae_in.to(torch.get_autocast_dtype(sae_in.device.type))
        flat = sae_in.reshape(-1, sae_in.shape[-1])
        acts, indices, _ = ops.topk_encode(flat, weight, bias, self.cfg.k, implementation="auto")
        shape = (*sae_in.shape[:-1], self.cfg.k)
        return acts.reshape(shape), indices.reshape(shape)

    def decode_topk(self, acts: Tensor, indices: Tensor) -> Tensor:
        """Reconstruction [..., D] of activations [..., K]: what SAELens' ``decode`` does to dense ones."""
        if self._rescales:
            acts = acts / self.W_dec.norm(dim=-1)[indices]
        k = acts.shape[-1]
        out = ops.sparse_decode(acts.reshape(-1, k), indices.reshape(-1, k), self.W_dec, implementation="auto")
        out = self.hook_sae_recons(out.reshape(*acts.shape[:-1], -1) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def dead_latents(self, sae_in: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(pre-activations, mask) as AuxK wants them: [N, L], though only where some latent is dead."""
        if mask is None or not bool(mask.any()):
            return sae_in, None
        hidden_pre = sae_in @ self.W_enc + self.b_enc
        return hidden_pre * self.W_dec.norm(dim=-1) if self._rescales else hidden_pre, mask

    # The encoder lies latent by latent in memory, as the kernels want it; files keep SAELens' layout.

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        self.W_enc = nn.Parameter(self.W_enc.data.T.contiguous().T)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


class FastTopKSAE(FusedTopK, TopKSAE):
    """SAELens' TopKSAE, computed by fastsae. Make it with ``register()`` and ``SAE.load_from_disk``."""


class FastTopKTrainingSAE(FusedTopK, TopKTrainingSAE):
    """SAELens' TopKTrainingSAE, computed by fastsae: same losses, and no [N, L] matrix in a training step."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if is_hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post):
            return super().training_forward_pass(step_input)
        sae_in = self.process_sae_in(step_input.sae_in)
        acts, indices = self.encode_topk(sae_in)
        sae_out = self.decode_topk(acts, indices)
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        auxk = self.calculate_topk_aux_loss(
            step_input.sae_in, sae_out, *self.dead_latents(sae_in, step_input.dead_neuron_mask)
        )
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=sparse(acts.detach(), indices, self.cfg.d_sae),
            hidden_pre=acts,  # of the active latents only
            loss=mse_loss + auxk,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": auxk},
        )


def is_hooked(*hook_points: nn.Module) -> bool:
    """Whether anything listens at one of SAELens' hook points."""
    return any(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks for point in hook_points)


def dense(acts: Tensor, indices: Tensor, num_latents: int) -> Tensor:
    """[..., L] of [..., K]."""
    return acts.new_zeros(*acts.shape[:-1], num_latents).scatter(-1, indices, acts)


def sparse(acts: Tensor, indices: Tensor, num_latents: int) -> Tensor:
    """A COO tensor [N, L] of [N, K], which is what SAELens' trainer counts firings on."""
    rows = torch.arange(len(acts), device=acts.device).repeat_interleave(acts.shape[-1])
    at = torch.stack([rows, indices.reshape(-1)])
    return torch.sparse_coo_tensor(at, acts.reshape(-1), (len(acts), num_latents), check_invariants=False)
