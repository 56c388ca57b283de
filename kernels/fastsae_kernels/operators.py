"""Encode, decode, their backwards and the select as torch operators.

Shapes: N tokens, D width, L latents, K active latents.

A backend provides them: ``triton`` (this package's kernels) or ``cpu``. As registered operators they are opaque, shaped
calls for ``torch.compile(fullgraph=True)`` and FakeTensor.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .reference import accumulator_dtype

NAMESPACE = __name__.split(".")[0].replace("-", "_")
BACKENDS = ("triton", "cpu")


def backend(name: str) -> ModuleType:
    """The module with ``encode, decode, encode_backward, decode_backward, act_grad, select`` of that name."""
    if name == "triton":
        from . import launch

        return launch
    if name == "cpu":
        from . import cpu

        return cpu
    raise ValueError(f"implementation: expected one of {(*BACKENDS, 'reference')}, got {name!r}")


@torch.library.custom_op(f"{NAMESPACE}::encode", mutates_args=())
def encode(
    x: Tensor, weight: Tensor, bias: Tensor, latent_mask: Tensor | None, k: int, activation: str, impl: str
) -> tuple[Tensor, Tensor]:
    return backend(impl).encode(x, weight, bias, k, activation, latent_mask)


@encode.register_fake
def _(x, weight, bias, latent_mask, k, activation, impl):
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=accumulator_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::encode_backward", mutates_args=())
def encode_backward(
    d_acts: Tensor, top_indices: Tensor, x: Tensor, num_latents: int, impl: str
) -> tuple[Tensor, Tensor]:
    return backend(impl).encode_backward(d_acts, top_indices, x, num_latents)


@encode_backward.register_fake
def _(d_acts, top_indices, x, num_latents, impl):
    acc = accumulator_dtype(x.dtype)
    return x.new_empty((num_latents, x.shape[1]), dtype=acc), x.new_empty(num_latents, dtype=acc)


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=())
def decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, impl: str) -> Tensor:
    return backend(impl).decode(top_acts, top_indices, W_dec, b_dec)


@decode.register_fake
def _(top_acts, top_indices, W_dec, b_dec, impl):
    return W_dec.new_empty((top_acts.shape[0], W_dec.shape[1]))


@torch.library.custom_op(f"{NAMESPACE}::decode_backward", mutates_args=())
def decode_backward(
    grad_out: Tensor, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return backend(impl).decode_backward(grad_out, top_acts, top_indices, W_dec)


@decode_backward.register_fake
def _(grad_out, top_acts, top_indices, W_dec, impl):
    return torch.empty_like(top_acts), torch.empty_like(W_dec, dtype=accumulator_dtype(W_dec.dtype))


@torch.library.custom_op(f"{NAMESPACE}::act_grad", mutates_args=())
def act_grad(grad_out: Tensor, top_indices: Tensor, W_dec: Tensor, impl: str) -> Tensor:
    return backend(impl).act_grad(grad_out, top_indices, W_dec)


@act_grad.register_fake
def _(grad_out, top_indices, W_dec, impl):
    return W_dec.new_empty(top_indices.shape, dtype=accumulator_dtype(W_dec.dtype))


@torch.library.custom_op(f"{NAMESPACE}::select", mutates_args=())
def select(pre_acts: Tensor, k: int, activation: str, impl: str) -> Tensor:
    return backend(impl).select(pre_acts, k, activation)


@select.register_fake
def _(pre_acts, k, activation, impl):
    return pre_acts.new_empty((pre_acts.shape[0], k), dtype=torch.int64)
