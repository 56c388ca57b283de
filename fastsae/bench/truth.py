"""The float64 truth that every contestant of ``fastsae bench`` must agree with before it is timed.

Shapes: N tokens, D width, L latents, K active latents.

A selection is judged by its regret, what its activations miss of the best possible sum, because equally good
implementations order near-ties differently. Values and gradients are judged at the contestant's own indices.

The judgement is that of ``fastsae_kernels.testing.assert_no_worse``: no worse than torch at the same dtype, plus a
floor that :func:`limits` explains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import exact
from .problem import Problem


class Verdict(NamedTuple):
    """How far a contestant's results are from the truth."""

    errors: dict[str, float]
    """Relative errors by name, see :func:`row_error`; ``regret`` is the worst token's."""

    difference: str | None
    """What differs by more than its limit, in words."""

    exact_sets: float | None = None
    """Share of tokens whose selected set is the float64 one, where there is a selection."""

    limits: dict[str, float] | None = None
    """The errors allowed, by name."""


def tolerance(dtype: torch.dtype) -> float:
    """What nobody may exceed, torch included: four roundings to ``dtype``, but at least 3e-5."""
    return max(4 * torch.finfo(dtype).eps, 3e-5)


def limits(p: Problem, rounding: dict[str, float], by_torch: Verdict | None) -> dict[str, float]:
    """The error allowed of each result: ``(1 + 1/√D) max(torch's, rounding) + floor``, at most :func:`tolerance`.

    ``rounding`` is the error that the truth itself has once it is rounded to the result's dtype: nobody can do better
    but by luck, and by luck two equally good roundings of D numbers differ by 1/√D of themselves. The floor is for
    float32 sums in another order: n terms cost about √n roundings of 2⁻²⁴, and eight times that is allowed, because
    the worst of many rows is looked at. Where torch has no result, and for torch itself, the tolerance alone holds.
    """
    most = tolerance(p.x.dtype)
    if by_torch is None:
        return dict.fromkeys(rounding, most)
    (N, D), L = p.x.shape, len(p.weight)
    longest = {"regret": D, "top_acts": D, "out": D + p.k, "d_acts": D, "db_dec": N + D + L}  # gradients: N + D
    return {
        name: min(
            most, (1 + D**-0.5) * max(by_torch.errors[name], rounded) + 2.0**-21 * longest.get(name, N + D) ** 0.5
        )
        for name, rounded in rounding.items()
    }


def judge(op: str, p: Problem, results: tuple[Tensor, ...], by_torch: Verdict | None = None) -> Verdict:
    """Compare what a contestant of operation ``op`` returned with the truth, beside torch's verdict if there is one."""
    exact_sets = None
    if op not in ("decode", "decode bwd"):
        indices = results[0] if op == "topk" else results[1]
        chosen = indices.sort(1).values
        if chosen.min() < 0 or chosen.max() >= len(p.weight) or (chosen.diff(dim=1) == 0).any():
            return Verdict({}, f"top_indices: expected {p.k} different ones in [0, {len(p.weight)}), got others")
        exact_sets = (chosen == p.best[1].sort(1).values).all(1).double().mean().item()
    found = _JUDGES[op](p, *results)
    errors = {name: row_error(*pair[:2]) if isinstance(pair, tuple) else pair for name, pair in found.items()}
    rounding = {name: _rounding(op, p, pair) for name, pair in found.items()}
    allowed = limits(p, rounding, by_torch if by_torch and by_torch.errors.keys() == errors.keys() else None)
    wrong = ", ".join(
        f"{name} {error:.1e}, expected at most {allowed[name]:.1e}"
        for name, error in errors.items()
        if not error <= allowed[name]  # NaN is wrong
    )
    return Verdict(errors, f"relative error of {wrong}" if wrong else None, exact_sets, allowed)


def _rounding(op: str, p: Problem, pair: float | tuple[Tensor, ...]) -> float:
    """The truth's own error in the result's dtype; of regret, one rounding where the scores ranked are in x's dtype."""
    if not isinstance(pair, tuple):
        return torch.finfo(p.x.dtype).eps if op == "topk" or torch.version.hip else 0.0
    got, want, *rounded = pair
    return row_error(rounded[0] if rounded else want.to(got.dtype), want)


# Each gives, by name, the regret, or a result, its truth and, where it has more than one rounding, that rounded.


def _judge_encode(p, acts, indices):
    want = p.activations(indices)
    return {"regret": _regret(p, want), "top_acts": (acts, want)}


def _judge_topk(p, indices):
    return {"regret": _regret(p, p.activations(indices))}


def _judge_decode(p, out):
    return {"out": (out, exact.weighted_sum(p.acts, p.best[1], p.W_dec))}


def _judge_decode_backward(p, d_acts, dW_dec):
    indices = p.best[1]
    return {
        "d_acts": (d_acts, exact.dots(p.grad_out, p.W_dec, indices)),
        "dW_dec": (dW_dec, exact.by_latent(p.acts, indices, p.grad_out, len(p.W_dec))),
    }


def _judge_encode_backward(p, acts, indices, dW_enc, db_enc):
    d_acts = p.grad_acts.double().masked_fill(acts <= 0, 0.0)
    return {
        "dW_enc": (dW_enc, exact.by_latent(d_acts, indices, p.centered, len(p.weight))),
        "db_enc": (db_enc, exact.count(d_acts, indices, len(p.weight))),
    }


def _judge_forward_backward(p, acts, indices, out, dW_enc, db_enc, dW_dec, db_dec):
    want = p.activations(indices)
    d_acts = exact.dots(p.grad_out, p.W_dec, indices).masked_fill(acts <= 0, 0.0)
    want_db = exact.count(d_acts, indices, len(p.weight))
    return {
        "regret": _regret(p, want),
        "top_acts": (acts, want),
        "out": _sum_pair(out, exact.weighted_sum(want, indices, p.W_dec), p.b_dec.double()),
        "dW_enc": (dW_enc, exact.by_latent(d_acts, indices, p.centered, len(p.weight))),
        "db_enc": (db_enc, want_db),
        "dW_dec": (dW_dec, exact.by_latent(want, indices, p.grad_out, len(p.W_dec))),
        "db_dec": _sum_pair(db_dec, p.grad_out.double().sum(0), -want_db @ p.weight.double()),
    }


def _sum_pair(got: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A result that two parts are added up to, which are rounded before: its truth, and that rounded likewise."""
    return got, one + other, one.to(got.dtype) + other.to(got.dtype)


_JUDGES: dict[str, Callable[..., Mapping[str, float | tuple[Tensor, ...]]]] = {
    "encode": _judge_encode,
    "topk": _judge_topk,
    "decode": _judge_decode,
    "decode bwd": _judge_decode_backward,
    "encode bwd": _judge_encode_backward,
    "fwd+bwd": _judge_forward_backward,
}


def row_error(got: Tensor, want: Tensor) -> float:
    """The largest Euclidean error of a row, relative to its own norm or, if that is smaller, to the median one.

    A vector counts as one row. The median leaves out rows that are 0, such as the gradients of unused latents.
    """
    got, want = torch.atleast_2d(got), torch.atleast_2d(want)
    if got.shape != want.shape:
        return float("inf")
    norms = want.norm(dim=1)
    used = norms[norms > 0]
    scale = norms.clamp_min(used.median() if len(used) else torch.finfo(torch.float64).tiny)
    errors = [(got[part].double() - want[part]).norm(dim=1) / scale[part] for part in exact.chunks(*want.shape)]
    return torch.cat(errors).max().item()


def _regret(p: Problem, chosen: Tensor) -> float:
    """The largest share of a token's best possible sum that the chosen activations [N, K] miss."""
    best = p.best[0].sum(1)
    return ((best - chosen.sum(1)) / best.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
