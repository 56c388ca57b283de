"""The joint training step against float64 autograd of the reference: losses, every gradient, every sink."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from fastsae_kernels import dense_step, reference
from fastsae_kernels.auxk import auxk_grads, keep_largest
from fastsae_kernels.step import Loss, coder_step
from fastsae_kernels.step_parts import Coder, GradSink
from fastsae_kernels.testing import assert_no_worse
from torch import Tensor

IMPLEMENTATIONS = ["reference", "cpu", "triton"]
SHAPES = [  # N, D, L, K
    (1, 7, 12, 1),
    (7, 19, 33, 5),
    (33, 16, 64, 7),
    (5, 123, 40, 9),
]


class Case(NamedTuple):
    x: Tensor  # [N, D]
    y: Tensor  # [N, E]
    coder: Coder
    loss: Loss
    k: int
    activation: str = "topk"


def make_case(shape, *, E=None, multi=False, dead=0, skip=False, centered=True, activation="topk", seed=0) -> Case:
    """Everything float64."""
    N, D, L, K = shape
    E = E or D
    gen = torch.Generator().manual_seed(seed + N + D + L + K)

    def gaussian(*size):
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    x = gaussian(N, D)
    y = x if centered and E == D and not skip else gaussian(N, E)
    W_dec = torch.nn.functional.normalize(gaussian(L, E), dim=1)
    coder = Coder(
        gaussian(L, D) / D**0.5, 0.1 * gaussian(L), W_dec, gaussian(E), gaussian(E, D) / D if skip else None, centered
    )
    ids = torch.randperm(L, generator=gen)[:dead].sort().values
    variance = (y - y.mean(0)).square().sum() + 1
    loss = Loss(variance, min(4 * K, L) if multi else 0, ids if dead else None, 3, 0.25, share=0.5)
    return Case(x, y, coder, loss, K, activation)


def to(case: Case, dtype: torch.dtype, device: str) -> Case:
    """``case`` with tensors of ``dtype``."""

    def move(value):
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        return type(value)(*map(move, value)) if isinstance(value, tuple) and hasattr(value, "_fields") else value

    return move(case)


def autograd(case: Case) -> dict[str, Tensor]:
    """Losses and gradients by autograd of the reference's functions, in the case's own dtype."""
    x, y, loss, k = case.x, case.y, case.loss, case.k
    tensors = {name: t for name, t in case.coder._asdict().items() if isinstance(t, Tensor)}
    p = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    b_dec = p["b_dec"] if case.coder.centered else None
    acts, indices, pre_acts = reference.topk_encode(
        x, p["weight"], p["bias"], loss.multi_k or k, b_dec=b_dec, activation=case.activation, return_pre_acts=True
    )
    offset = p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)
    residual = y - reference.sparse_decode(acts[:, :k], indices[:, :k], p["W_dec"]) - offset
    fvu = residual.square().sum() / loss.variance
    auxk = multi = torch.zeros_like(fvu)
    if loss.dead is not None:
        dead_acts = pre_acts[:, loss.dead]
        kept = dead_acts.detach().sort(dim=1, descending=True, stable=True).indices[:, : loss.k_aux]
        mask = torch.zeros_like(dead_acts).scatter_(1, kept, 1.0)
        error = (dead_acts * mask) @ p["W_dec"][loss.dead] - residual.detach()
        auxk = min(len(loss.dead) / loss.k_aux, 1) * error.square().sum() / loss.variance
    if loss.multi_k:
        wide = y - reference.sparse_decode(acts, indices, p["W_dec"]) - offset
        multi = wide.square().sum() / loss.variance
    ((fvu + loss.alpha * auxk + multi / 8) * loss.share).backward()
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in p.items()}
    return {"fvu": fvu, "auxk": auxk, "multi": multi, "indices": indices[:, :k], **grads}


def joint(case: Case, implementation: str) -> dict[str, Tensor]:
    acc = reference.accumulator_dtype(case.x.dtype)
    sink = GradSink(torch.zeros_like(case.coder.weight, dtype=acc), torch.zeros_like(case.coder.W_dec, dtype=acc))
    out = coder_step(
        case.x, case.y, case.coder, case.loss, sink,
        k=case.k, activation=case.activation, implementation=implementation,
    )  # fmt: skip
    fired = torch.zeros(len(case.coder.bias), dtype=torch.bool, device=case.x.device)
    fired[out.top_indices[out.top_acts > 0]] = True
    assert out.fired.equal(fired)
    results = {
        "fvu": out.fvu, "auxk": out.auxk, "multi": out.multi_fvu, "indices": out.top_indices,
        "weight": sink.dW_enc, "bias": out.d_bias, "W_dec": sink.dW_dec, "b_dec": out.d_b_dec,
    }  # fmt: skip
    return results if out.d_skip is None else {**results, "W_skip": out.d_skip}


VARIANTS = {
    "plain": {},
    "multi": {"multi": True},
    "auxk": {"dead": 5},
    "few dead": {"dead": 2},
    "all": {"multi": True, "dead": 5, "skip": True},
    "transcoder": {"centered": False},
    "widths": {"centered": False, "E": 11, "multi": True, "skip": True},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("implementation", "shape"),
    [(name, shape) for name in IMPLEMENTATIONS for shape in (SHAPES if name != "triton" else SHAPES[1:3])],
    ids=str,
)
def test_losses_and_gradients_equal_autograd(implementation, variant, shape, device):
    case = make_case(shape, **VARIANTS[variant])
    if implementation != "triton":
        truth, got = autograd(case), joint(case, implementation)
        assert got["indices"].equal(truth["indices"])
        for name, want in truth.items():
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    case = to(case, torch.float32, "cpu")
    truth, plain = autograd(to(case, torch.float64, "cpu")), autograd(case)
    got = joint(to(case, torch.float32, device if implementation == "triton" else "cpu"), implementation)
    for name, want in truth.items():
        if name != "indices":  # the same numbers in another order of sums
            assert_no_worse(
                got[name].cpu(), plain[name], want, floor=2e-6
            )  # a d_act of terms 8 times as large: 16 ulps


@pytest.mark.parametrize("variant", ["plain", "all", "widths"])
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_dense_products_give_the_same_gradients(implementation, variant, device, monkeypatch):
    case = to(make_case((33, 16, 64, 7), **VARIANTS[variant]), torch.float32, "cpu")
    truth, plain = autograd(to(case, torch.float64, "cpu")), autograd(case)
    monkeypatch.setenv("FASTSAE_BACKWARD", "dense")
    monkeypatch.setattr("fastsae_kernels.dense_step.BLOCK_NUMBERS", 33 * 2 * 10)  # several blocks of latents
    got = joint(to(case, torch.float32, device if implementation == "triton" else "cpu"), implementation)
    for name, want in truth.items():
        if name != "indices":
            assert_no_worse(got[name].cpu(), plain[name], want, floor=1e-6)  # another order of sums


def test_the_way_back_is_chosen_by_latents_per_active_one(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not dense_step.pays(64, 32, cpu)  # measured: never there
    assert dense_step.pays(16 * 32, 32, gpu)
    assert not dense_step.pays(64 * 32, 32, gpu)
    monkeypatch.setenv("FASTSAE_BACKWARD", "dense")
    assert dense_step.pays(64 * 32, 32, cpu)
    monkeypatch.setenv("FASTSAE_BACKWARD", "sparse")
    assert not dense_step.pays(64, 32, cpu)
    monkeypatch.setenv("FASTSAE_BACKWARD", "both")
    with pytest.raises(ValueError, match="expected auto, sparse or dense, got 'both'"):
        dense_step.pays(64, 32, cpu)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groupmax(implementation, device):
    case = make_case((9, 12, 24, 6), activation="groupmax")
    case = to(case, torch.float32, device if implementation == "triton" else "cpu")
    truth, got = autograd(to(case, torch.float64, "cpu")), joint(case, implementation)
    assert got["indices"].cpu().equal(truth["indices"])
    for name, want in truth.items():
        torch.testing.assert_close(got[name].cpu().double(), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_with_narrow_copies_is_as_good_as_torch(implementation, device):
    """Weights are float32 with bfloat16 copies, as in training on a GPU; judged at the step's own indices."""
    case = make_case((33, 16, 64, 7))
    device = device if implementation == "triton" else "cpu"
    coder = to(case, torch.float32, device).coder
    low = coder.weight.bfloat16(), coder.W_dec.bfloat16()
    case = case._replace(
        x=case.x.to(device, torch.bfloat16), y=case.y.to(device, torch.bfloat16),
        coder=coder._replace(low_weight=low[0], low_W_dec=low[1]), loss=to(case, torch.float32, device).loss,
    )  # fmt: skip
    got = joint(case, implementation)
    centered = (case.x.float() - coder.b_dec).bfloat16().double()
    W_enc, W_dec, indices = low[0].double(), low[1].double(), got["indices"]
    acts = (centered @ W_enc.T + coder.bias.double()).relu().gather(1, indices)
    dense = torch.zeros(33, 64, dtype=torch.float64, device=device).scatter_(1, indices, acts)
    residual = dense @ W_dec + coder.b_dec.double() - case.y.double()
    assert abs(got["fvu"].item() - (residual.square().sum() / case.loss.variance).item()) < 1e-2
    grad = residual * (2 * case.loss.share / case.loss.variance)
    d_scores = (grad @ W_dec.T) * (dense > 0)
    truth = {"W_dec": dense.T @ grad, "weight": d_scores.T @ centered, "bias": d_scores.sum(0)}
    rounded = grad.bfloat16().double()  # what storing the residual in bfloat16 costs torch too
    d_rounded = (rounded @ W_dec.T) * (dense > 0)
    plain = {"W_dec": dense.T @ rounded, "weight": d_rounded.T @ centered, "bias": d_rounded.sum(0)}
    for name, want in truth.items():
        assert_no_worse(
            got[name], plain[name].float(), want, floor=2**-8
        )  # one bfloat16 rounding, which the interpreter cuts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_steps_are_bit_identical(implementation, device):
    case = make_case((33, 16, 64, 7), multi=True, dead=5)
    case = to(case, torch.float32, device if implementation == "triton" else "cpu")
    first, second = joint(case, implementation), joint(case, implementation)
    assert all(first[name].equal(second[name]) for name in first)


def test_multi_k_must_be_wider():
    case = make_case((3, 4, 8, 2))
    with pytest.raises(ValueError, match="multi_k"):
        joint(case._replace(loss=case.loss._replace(multi_k=2)), "cpu")


def test_keep_largest_breaks_ties_by_column():
    acts = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0]])
    assert keep_largest(acts, 2).tolist() == [[1.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0]]


def test_auxk_in_blocks_equals_auxk_at_once(monkeypatch):
    case = make_case((33, 16, 64, 7), dead=9)
    c, residual = case.coder, torch.randn(33, 16, dtype=torch.float64)
    arguments = (case.x, residual, case.loss.dead, c.weight, c.bias, c.W_dec, 3, case.loss.variance, 0.25)
    whole = auxk_grads(*arguments)
    monkeypatch.setattr("fastsae_kernels.auxk.BLOCK", 40)
    for got, want in zip(auxk_grads(*arguments), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
