"""A coder as plain tensors and facts: the common ground that every format is read into and written from.

Shapes: ``...`` any leading dimensions, D input width, E output width (D but for some transcoders), L latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..errors import CheckpointError

Activation = Literal["topk", "groupmax", "jumprelu", "relu"]


@dataclass(frozen=True, eq=False)
class Coder:
    """``decode(act(W_enc x + b_enc)) [+ W_skip x]``, with everything that changes what it computes.

    Raises :class:`CheckpointError` where shapes do not fit, or weights are not finite floats.
    """

    W_enc: Tensor
    """Encoder weights, [L, D]."""

    b_enc: Tensor
    """Encoder bias, [L]."""

    W_dec: Tensor
    """Decoder weights, [L, E]."""

    b_dec: Tensor
    """Decoder bias, [E]."""

    activation: Activation = "topk"
    """topk and groupmax keep k latents of a token, jumprelu those above their threshold, relu all positive ones."""

    k: int | None = None
    """Active latents per token; for jumprelu the mean that a BatchTopK coder was trained for, where known."""

    threshold: Tensor | None = None
    """jumprelu's thresholds, [L]."""

    W_skip: Tensor | None = None
    """Skip connection, [E, D]: out += W_skip x."""

    centered: bool = True
    """Encode ``x - b_dec`` rather than ``x``."""

    transcode: bool = False
    """Predicts a module's output from its input."""

    layer_norm: bool = False
    """Normalise x to mean 0 and deviation 1 first, and scale the output back (Gao et al. 2024, appendix A.1)."""

    hookpoint: str | None = None
    """Name of the Hugging Face module it sits on (``h.3.mlp``)."""

    hook_name: str | None = None
    """TransformerLens' name of the same place, where the file has one."""

    model: str | None = None
    """Name of the model it was trained on."""

    notes: dict[str, Any] = field(default_factory=dict)
    """What else the file says and other formats may keep; JSON values."""

    def __post_init__(self) -> None:
        for name in ("hookpoint", "hook_name", "model"):
            if not isinstance(getattr(self, name), str | None):
                raise CheckpointError(f"{name}: expected text, got {getattr(self, name)!r}; the file is damaged")
        for name in ("W_enc", "W_dec"):
            if getattr(self, name).ndim != 2:
                raise CheckpointError(f"{name}: expected a matrix, got shape {list(getattr(self, name).shape)}")
        num_latents, d_in, d_out = self.num_latents, self.d_in, self.d_out
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (num_latents, d_in),
            "b_enc": (num_latents,),
            "W_dec": (num_latents, d_out),
            "b_dec": (d_out,),
        }
        if self.W_skip is not None:
            shapes["W_skip"] = (d_out, d_in)
        if (self.threshold is not None) != (self.activation == "jumprelu"):
            raise CheckpointError("expected thresholds for a jumprelu coder, and for no other")
        if self.threshold is not None:
            shapes["threshold"] = (num_latents,)
        for name, shape in shapes.items():
            _check(name, getattr(self, name), shape)
        if self.centered and d_in != d_out:
            raise CheckpointError(f"expected equal widths for a coder that encodes x - b_dec, got {d_in} and {d_out}")
        if self.activation in ("topk", "groupmax") and not (isinstance(self.k, int) and 1 <= self.k <= num_latents):
            raise CheckpointError(f"expected k from 1 to {num_latents}, got {self.k!r}")
        if self.activation == "groupmax" and num_latents % (self.k or 1):
            raise CheckpointError(f"groupmax: expected latents divisible by k, got {num_latents} and {self.k}")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[-1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[-1]

    @property
    def num_latents(self) -> int:
        return self.W_enc.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        named = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all of its tensors without rounding."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors().values()))

    def to(self, dtype: torch.dtype) -> Coder:
        return self.replace(**{name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def replace(self, **changes: Any) -> Coder:
        return dataclasses.replace(self, **changes)

    # ---- what it computes, densely, in float32 or wider ----

    def encode(self, x: Tensor) -> Tensor:
        """Activations, dense, [..., L], of x [..., D]."""
        wide = self._wide()
        x = wide._normalise(x.to(wide.W_enc.dtype))[0]
        if self.centered:
            x = x - wide.b_dec
        if self.activation in ("topk", "groupmax"):
            assert isinstance(self.k, int)
            acts, indices, _ = ops.topk_encode(
                x.reshape(-1, self.d_in), wide.W_enc, wide.b_enc, self.k,
                activation=self.activation, implementation="reference",
            )  # fmt: skip
            dense = acts.new_zeros(len(acts), self.num_latents).scatter(-1, indices, acts)
            return dense.reshape(*x.shape[:-1], self.num_latents)
        pre_acts = F.linear(x, wide.W_enc, wide.b_enc)
        acts = pre_acts.relu()
        return acts if wide.threshold is None else acts * (pre_acts > wide.threshold)

    def decode(self, acts: Tensor, x: Tensor) -> Tensor:
        """Output [..., E] of dense activations [..., L]; ``x`` is the input they come from."""
        wide = self._wide()
        out = acts.to(wide.W_dec.dtype) @ wide.W_dec + wide.b_dec
        x = x.to(out.dtype)
        if wide.W_skip is not None:
            out = out + x @ wide.W_skip.mT
        if self.layer_norm:
            _, mean, deviation = self._normalise(x)
            out = out * deviation + mean
        return out

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    def _wide(self) -> Coder:
        return self.to(torch.promote_types(self.dtype, torch.float32))

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.layer_norm:
            mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            x = (x - mean) / (deviation + 1e-5)
        return x, mean, deviation


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}; the file is damaged")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name}: expected floats, got {tensor.dtype}; the file is of another kind")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: expected finite numbers, got NaN or inf; the file is damaged")
