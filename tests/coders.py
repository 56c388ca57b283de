"""Random coders of every kind, and their function written out from the formats' definitions, in float64."""

from typing import Any

import torch
from torch import Tensor

from fastsae.compat.coder import Coder

D, L, K = 16, 48, 4


def make_coder(
    activation: str = "topk", *, d_out: int = D, skip: bool = False, dtype=torch.float32, **facts: Any
) -> Coder:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    W_dec = draw(L, d_out)
    if activation in ("topk", "groupmax"):
        facts.setdefault("k", K)
    return Coder(
        W_enc=draw(L, D) / 4,
        b_enc=draw(L) / 4,
        W_dec=(W_dec.float() / W_dec.float().norm(dim=1, keepdim=True)).to(dtype),
        b_dec=draw(d_out),
        activation=activation,  # type: ignore[arg-type]
        threshold=draw(L).abs() / 4 if activation == "jumprelu" else None,
        W_skip=draw(d_out, D) / 8 if skip else None,
        **{"hookpoint": "h.3.mlp", "model": "gpt2", "centered": not facts.get("transcode", False), **facts},
    )


def inputs(dtype=torch.float32) -> Tensor:
    return torch.randn(5, 7, D, generator=torch.Generator().manual_seed(6)).to(dtype)


def truth(coder: Coder, x: Tensor) -> tuple[Tensor, Tensor]:
    """(activations [..., L], output [..., E]) in float64, straight from the definitions."""
    t = {name: tensor.double() for name, tensor in coder.tensors().items()}
    x = x.double()
    mean, deviation, z = 0, 1, x
    if coder.layer_norm:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        z = (x - mean) / (deviation + 1e-5)
    pre = (z - t["b_dec"] if coder.centered else z) @ t["W_enc"].T + t["b_enc"]
    if coder.activation == "jumprelu":
        acts = pre.relu() * (pre > t["threshold"])
    elif coder.activation == "relu":
        acts = pre.relu()
    elif coder.activation == "topk":
        values, indices = pre.topk(coder.k)
        acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    else:
        groups = pre.relu().unflatten(-1, (coder.k, -1))
        acts = (groups * (groups == groups.amax(-1, keepdim=True))).flatten(-2)
    out = (acts @ t["W_dec"] + t["b_dec"]) * deviation + mean
    return acts, out + x @ t["W_skip"].T if "W_skip" in t else out


def assert_computes(coder: Coder, acts: Tensor, out: Tensor, x: Tensor, tolerance: float = 1e-6) -> None:
    """``coder`` gives ``acts`` and ``out`` for ``x``, to ``tolerance`` relative to their size."""
    got = coder.encode(x)
    torch.testing.assert_close(got.double(), acts, atol=tolerance * acts.abs().max().item(), rtol=tolerance)
    out_tolerance = tolerance * out.abs().max().item()
    torch.testing.assert_close(coder.decode(got, x).double(), out, atol=out_tolerance, rtol=tolerance)
