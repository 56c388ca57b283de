"""FastSae: a TopK sparse autoencoder or transcoder, with sparsify's interface and file format.

Shapes: ``...`` any leading dimensions, D width (``d_in``), E output width (``d_out``), L latents, K active latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import loss, ops
from .coder_config import SaeConfig
from .coder_files import CoderFiles
from .coder_inputs import as_rows, check_activations, check_active
from .errors import CheckpointError
from .ops import EncoderOutput, Peers


class ForwardOutput(NamedTuple):
    """What a coder's forward returns."""

    sae_out: Tensor
    """Reconstruction, [..., E]."""

    latent_acts: Tensor
    """Activations of the selected latents, [..., K]."""

    latent_indices: Tensor
    """Indices of the selected latents, [..., K], int64."""

    fvu: Tensor
    """Fraction of variance unexplained, a scalar."""

    auxk_loss: Tensor
    """AuxK loss, a scalar; 0 without dead latents."""

    multi_topk_fvu: Tensor
    """FVU with 4k latents, a scalar; 0 unless ``cfg.multi_topk``."""


class FastSae(CoderFiles):
    """``decode(TopK(ReLU((x - b_dec) W_encᵀ + b_enc)))`` (Gao et al. 2024, arXiv 2406.04093).

    Parameters: ``encoder.weight [L, D]``, ``encoder.bias [L]``, ``W_dec [L, E]``, ``b_dec [E]``, and with a
    skip connection ``W_skip [E, D]``. A transcoder (``cfg.transcode``) encodes ``x`` itself, without b_dec, and
    may have another width E; an autoencoder's is D.
    The encoder's product is computed in the precision of ``x``, summed in float32. BatchTopK coders have a buffer
    ``threshold`` []: training sets it to about the smallest selected activation, and every activation above it is
    active, so that tokens do not depend on each other; -1 is unset, and then the largest of the batch at hand are.
    """

    W_dec: nn.Parameter | None
    W_skip: nn.Parameter | None
    threshold: Tensor
    peers: Peers | None = None
    """The ranks that hold the other latents, where training has split them."""

    def __init__(
        self,
        d_in: int,
        cfg: SaeConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        decoder: bool = True,
        d_out: int | None = None,
        implementation: str = "auto",
    ):
        super().__init__()
        self.cfg, self.d_in, self.num_latents = cfg, d_in, cfg.latents_for(d_in)
        self.d_out = cfg.output_width(d_in, d_out)
        self.implementation = implementation
        self.notes = {}

        self.encoder = nn.Linear(d_in, self.num_latents, device=device, dtype=dtype)
        self.encoder.bias.data.zero_()
        weight = self.encoder.weight.data
        if not decoder:
            self.W_dec = None
        elif cfg.transcode:
            self.W_dec = nn.Parameter(weight.new_zeros(self.num_latents, self.d_out))
        else:
            self.W_dec = nn.Parameter(weight.clone())
            if cfg.normalize_decoder:
                self.set_decoder_norm_to_unit_norm()
        self.b_dec = nn.Parameter(weight.new_zeros(self.d_out))
        self.W_skip = nn.Parameter(weight.new_zeros(self.d_out, d_in)) if cfg.skip_connection else None
        if cfg.activation == "batchtopk":
            self.register_buffer("threshold", torch.tensor(-1.0, device=device))

    @property
    def all_latents(self) -> int:
        """L, of all ranks where latents are split over some."""
        return self.num_latents if self.peers is None else self.peers.num_latents

    @property
    def _hookpoint(self) -> str:
        return str(self.notes.get("hookpoint", ""))

    def over_slices(self, part: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that hold this coder's latents; may overwrite ``part``."""
        return part if self.peers is None else self.peers.sum(part)

    def load_whole(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a whole coder."""
        self.load_state_dict(tensors)

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.weight.dtype

    def encode(self, x: Tensor, *, return_pre_acts: bool = False) -> EncoderOutput:
        """(top_acts [..., K], top_indices [..., K], pre_acts [..., L] or None) of x [..., D].

        Larger activations come first; K is k, for BatchTopK about as many as the token with the most needs.
        ``pre_acts``, the dense matrix that fusion exists to avoid, is made only on request.
        """
        check_activations("x", x, self.d_in, self._hookpoint)
        out = self._encode(x.reshape(-1, self.d_in), self.cfg.k, return_pre_acts=return_pre_acts)
        return EncoderOutput(*(None if t is None else t.reshape(*x.shape[:-1], t.shape[-1]) for t in out))  # type: ignore[arg-type]

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Reconstruction [..., E] of activations [..., K] of the latents [..., K]."""
        check_active(top_acts, top_indices)
        k = top_acts.shape[-1]
        flat = self._decode(top_acts.reshape(-1, k), top_indices.reshape(-1, k)) + self.b_dec
        return flat.reshape(*top_acts.shape[:-1], self.d_out)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
        k: int | None = None,
    ) -> ForwardOutput:
        """Reconstruct ``y [..., E]`` (by default x itself) from ``x [..., D]``, with the losses.

        ``dead_mask`` bool [L] turns AuxK on; ``total_variance`` is FVU's denominator where x is only a part
        of a batch; ``k`` is the number of active latents, by default the config's.
        """
        shape, x, y = self._rows(x, y)
        variance = loss.total_variance(y) if total_variance is None else total_variance
        k = k or self.cfg.k

        wide_k = 4 * k if self.cfg.multi_topk and self.cfg.activation == "topk" else k
        wide_acts, wide_indices, _ = self._encode(x, wide_k)
        if wide_k > k:  # larger first: the top k of the top 4k
            acts, indices = wide_acts[:, :k], wide_indices[:, :k]
        else:
            acts, indices = wide_acts, wide_indices
        offset = self.b_dec if self.W_skip is None else self.b_dec + x.to(self.dtype) @ self.W_skip.mT
        sae_out = self._decode(acts, indices) + offset
        residual = y - sae_out

        auxk_loss = multi_topk_fvu = sae_out.new_zeros(())
        if dead_mask is not None:
            auxk_loss = self.auxk_loss(x, residual, dead_mask, variance)
        if self.cfg.multi_topk:
            if self.cfg.activation != "topk":
                wide_acts, wide_indices, _ = self._encode(x, 4 * k, activation="topk")
            multi_topk_fvu = loss.fvu(y - self._decode(wide_acts, wide_indices) - offset, variance)

        return ForwardOutput(
            sae_out.reshape(*shape, self.d_out), acts.reshape(*shape, acts.shape[1]),
            indices.reshape(*shape, acts.shape[1]),
            loss.fvu(residual, variance), auxk_loss, multi_topk_fvu,
        )  # fmt: skip

    def _rows(self, x: Tensor, y: Tensor | None) -> tuple[torch.Size, Tensor, Tensor]:
        return as_rows(x, y, self.d_in, self.d_out, self._hookpoint)

    def _encode(self, x: Tensor, k: int, **options) -> EncoderOutput:
        options.setdefault("activation", self.cfg.activation)
        tensors = x, self.encoder.weight, self.encoder.bias
        how = {"b_dec": None if self.cfg.transcode else self.b_dec, "implementation": self.implementation}
        if options["activation"] != "batchtopk":
            return ops.topk_encode(*tensors, k, **how, **options)
        out = ops.batch_topk_encode(*tensors, k, self.threshold, **how)
        if options.get("return_pre_acts"):
            out = out._replace(pre_acts=ops.topk_encode(*tensors, k, return_pre_acts=True, **how).pre_acts)
        return out

    @torch.no_grad()
    def learn_threshold(self, least: Tensor, weight: float) -> None:
        """Move BatchTopK's threshold to ``least`` [], a batch's smallest selected activation, by ``weight``.

        A running mean with a floor, as SAELens and dictionary_learning keep theirs; inf (no activation) is none.
        """
        least = least.to(self.threshold)
        moved = torch.where(self.threshold < 0, least, torch.lerp(self.threshold, least, weight))
        self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))

    def _decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        if self.W_dec is None:
            raise CheckpointError("expected a decoder to decode with, but this coder was loaded with decoder=False")
        return ops.sparse_decode(top_acts, top_indices, self.W_dec, implementation=self.implementation)

    def auxk_loss(self, x: Tensor, residual: Tensor, dead_mask: Tensor, variance: Tensor) -> Tensor:
        """AuxK of rows x [N, D]: what the latents of ``dead_mask`` make of ``residual`` y - ŷ [N, E]; a scalar."""
        k_aux = self.cfg.k_aux_for(self.d_out)
        width = min(k_aux, self.num_latents)
        acts, indices, _ = self._encode(x, width, activation="topk", latent_mask=dead_mask)
        return loss.auxk(residual, self._decode(acts, indices), dead_mask.sum(), k_aux, variance)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Scale every row of W_dec to unit norm, in place."""
        assert self.W_dec is not None
        eps = torch.finfo(self.W_dec.dtype).tiny
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(eps))

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Project each row of W_dec's gradient onto the tangent of the unit sphere, in place."""
        assert self.W_dec is not None
        grad = self.W_dec.grad
        if grad is not None:
            grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)
