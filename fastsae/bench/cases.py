"""The contestants of ``fastsae bench``: every operation by every implementation.

Shapes: N tokens, D width, L latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from fastsae_kernels import operators, reference, sparse_decode, topk_encode
from torch import Tensor

from .problem import Problem

Run = Callable[[], tuple[Tensor, ...]]


class Coder(NamedTuple):
    """The two functions that every operation is made of."""

    encode: Callable[..., tuple[Tensor, Tensor]]  # (x, weight, bias, k, b_dec=None) -> activations, indices
    decode: Callable[..., Tensor]  # (acts, indices, W_dec, b_dec=None) -> tokens


def coder(implementation: str) -> Coder:
    """The public functions of fastsae_kernels, or what one would write in plain torch."""
    if implementation == "torch":
        return Coder(_torch_encode, _torch_decode)

    def encode(*tensors, **options):
        return topk_encode(*tensors, **options, implementation=implementation)[:2]

    return Coder(encode, partial(sparse_decode, implementation=implementation))


def _torch_encode(x, weight, bias, k, b_dec=None):
    x = x if b_dec is None else x - b_dec
    return torch.nn.functional.linear(x, weight, bias).relu().topk(k, dim=1)


def _torch_decode(acts, indices, W_dec, b_dec=None):
    if acts.is_cuda and acts.requires_grad and acts.dtype != torch.float32:  # CUDA's bags have no such backward
        out = acts.new_zeros(len(acts), len(W_dec)).scatter(1, indices, acts) @ W_dec
    else:
        out = torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum")
    return out if b_dec is None else out + b_dec


def contestants(op: str, p: Problem, implementations: list[str]) -> dict[str, Callable[[], Run]]:
    """What prepares each contestant's call, by name; the call returns what :func:`judge` expects of ``op``."""
    prepare = _PREPARE[op]
    calls: dict[str, Callable[[], Run]] = {name: partial(prepare, p, name) for name in implementations}
    if op == "encode" and "triton" in calls:
        del calls["triton"]
        both = {f"triton {path}": partial(_encoder_path, p, path) for path in ("fused", "chunked")}
        calls = both | calls
    return calls


def _encode(p: Problem, implementation: str) -> Run:
    encode = coder(implementation).encode
    return lambda: tuple(encode(p.centered, p.weight, p.bias, p.k))


def _encoder_path(p: Problem, path: str) -> Run:
    from fastsae_kernels import launch

    return lambda: launch.encode(p.centered, p.weight, p.bias, p.k, path=path)


def _topk(p: Problem, implementation: str) -> Run:
    scores = torch.nn.functional.linear(p.centered, p.weight, p.bias).relu_()
    if implementation == "torch":
        return lambda: (scores.topk(p.k, dim=1).indices,)
    if implementation == "reference":
        return lambda: (reference.select(scores, p.k),)
    select = operators.backend(implementation).select
    return lambda: (select(scores, p.k),)


def _decode(p: Problem, implementation: str) -> Run:
    decode, acts = coder(implementation).decode, _acts_for(p, implementation)
    return lambda: (decode(acts, p.best[1], p.W_dec),)


def _decode_backward(p: Problem, implementation: str) -> Run:
    acts, W_dec = _leaves(_acts_for(p, implementation), p.W_dec)
    with torch.enable_grad():
        out = coder(implementation).decode(acts, p.best[1], W_dec)
    return lambda: torch.autograd.grad(out, (acts, W_dec), p.grad_out, retain_graph=True)


def _encode_backward(p: Problem, implementation: str) -> Run:
    weight, bias = _leaves(p.weight, p.bias)
    with torch.enable_grad():
        acts, indices = coder(implementation).encode(p.centered, weight, bias, p.k)
    grad_acts = p.grad_acts.to(acts.dtype)
    return lambda: (
        acts.detach(), indices, *torch.autograd.grad(acts, (weight, bias), grad_acts, retain_graph=True)
    )  # fmt: skip


def _forward_backward(p: Problem, implementation: str) -> Run:
    encode, decode = coder(implementation)
    weight, bias, W_dec, b_dec = leaves = _leaves(p.weight, p.bias, p.W_dec, p.b_dec)

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            acts, indices = encode(p.x, weight, bias, p.k, b_dec=b_dec)
            out = decode(acts, indices, W_dec, b_dec)
        return acts.detach(), indices, out.detach(), *torch.autograd.grad(out, leaves, p.grad_out)

    return run


_PREPARE: dict[str, Callable[[Problem, str], Run]] = {
    "encode": _encode,
    "topk": _topk,
    "decode": _decode,
    "decode bwd": _decode_backward,
    "encode bwd": _encode_backward,
    "fwd+bwd": _forward_backward,
}


def _acts_for(p: Problem, implementation: str) -> Tensor:
    """The same numbers for all; torch's decoder wants them in the weights' dtype, ours in float32."""
    return p.acts if implementation == "torch" else p.acts.float()


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def chosen_encoder(p: Problem) -> str:
    """The name of the contestant that implementation ``triton`` encodes with by itself."""
    from fastsae_kernels.encoder_choice import choose_encoder

    return f"triton {choose_encoder(p.x.shape[1], len(p.weight), p.k, p.x.dtype, p.x.device)}"
