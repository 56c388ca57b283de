"""A coder as SAEBench wants it: SAELens' weight names and layouts, dense activations, and a mutable config.

    from fastsae.compat.saebench import as_saebench
    sae = as_saebench(FastSae.load_from_disk("checkpoints/run/h.8"), "gpt2-small", "blocks.8.hook_resid_post")
    core.multiple_evals([("my_sae", sae)], ...)

Shapes: ``...`` any leading dimensions, D width, L latents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..sae import FastSae
from .dense import dense_latents
from .hook_names import layer_of, to_transformer_lens


@dataclass
class SaeBenchConfig:
    """What SAEBench's evaluations read, and some of them write."""

    model_name: str
    hook_name: str
    hook_layer: int
    d_in: int
    d_sae: int
    dtype: str
    device: str
    architecture: str = "topk"
    architecture_str: str = "topk"
    activation_fn_str: str = "topk"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    finetuning_scaling_factor: bool = False
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=lambda: {"center_writing_weights": False})
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SaeBenchCoder(nn.Module):
    """A :class:`FastSae` under SAEBench's names; made by :func:`as_saebench`."""

    def __init__(self, sae: FastSae, cfg: SaeBenchConfig):
        super().__init__()
        self.sae, self.cfg = sae, cfg

    @property
    def W_enc(self) -> Tensor:
        """[D, L]"""
        return self.sae.encoder.weight.mT

    @property
    def W_dec(self) -> Tensor:
        """[L, D], rows of norm 1"""
        assert self.sae.W_dec is not None
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.encoder.bias

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [..., L] of x [..., D]."""
        return dense_latents(self.sae, x)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction [..., D] of dense activations [..., L], however many of them are not 0."""
        return acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)).to(x.dtype)

    def to(self, *args: Any, **kwargs: Any) -> SaeBenchCoder:
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self


@torch.no_grad()
def as_saebench(sae: FastSae, model_name: str, hook_name: str | None = None) -> SaeBenchCoder:
    """``sae`` for SAEBench: TransformerLens' ``model_name`` and ``hook_name`` (by default that of its hookpoint).

    Raises :class:`ConfigError` for transcoders, skip connections and coders whose decoder rows do not have norm 1,
    which SAEBench does not judge.
    """
    if sae.cfg.transcode or sae.W_skip is not None or sae.W_dec is None:
        raise ConfigError("SAEBench expects an autoencoder, got a transcoder, a skip connection or no decoder")
    norms = sae.W_dec.float().norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-2):
        raise ConfigError(f"SAEBench expects decoder rows of norm 1, got {norms.min():.3g} to {norms.max():.3g}")
    if hook_name is None:
        hook_name = sae.notes.get("hook_name") or to_transformer_lens(sae.notes.get("hookpoint", ""))
    assert isinstance(hook_name, str)
    layer = layer_of(hook_name)
    if layer is None:
        raise ConfigError(f"hook_name: expected one of a layer, such as blocks.8.hook_resid_post, got {hook_name!r}")
    cfg = SaeBenchConfig(
        model_name=model_name,
        hook_name=hook_name,
        hook_layer=layer,
        d_in=sae.d_in,
        d_sae=sae.num_latents,
        dtype=str(sae.dtype).removeprefix("torch."),
        device=str(sae.device),
        architecture=sae.cfg.activation,
        architecture_str=sae.cfg.activation,
        activation_fn_str=sae.cfg.activation,
        activation_fn_kwargs={"k": sae.cfg.k},
    )
    return SaeBenchCoder(sae, cfg)
