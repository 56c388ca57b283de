"""The training step of BatchTopK and of Matryoshka prefixes against autograd of the losses written out densely."""

from __future__ import annotations

import pytest
import torch
from fastsae_kernels import Adam, Rows, RowStep
from fastsae_kernels.batch_topk import part
from fastsae_kernels.step import GradSink, coder_step, select_batch
from fastsae_kernels.testing import assert_no_worse
from test_step import Case, make_case, to
from torch import Tensor

IMPLEMENTATIONS = ["reference", "cpu", "triton"]
SHAPE = (11, 19, 37, 3)  # N, D, L, K
VARIANTS = {
    "batch": ("batchtopk", (), {"dead": 5}),
    "prefixes": ("topk", (5, 6, 20, 37), {"dead": 5, "skip": True}),
    "both": ("batchtopk", (9, 37), {"centered": False, "E": 8, "skip": True}),
    "groups": ("groupmax", (10, 36), {}),
}


def case_of(variant: str) -> Case:
    activation, prefixes, options = VARIANTS[variant]
    shape = SHAPE if activation != "groupmax" else (11, 19, 36, 3)
    case = make_case(shape, activation=activation, **options)
    x = case.x.clone()
    x[0] *= 6
    y = x if case.y is case.x else case.y
    return case._replace(x=x, y=y, loss=case.loss._replace(prefixes=prefixes))


def autograd(case: Case) -> dict[str, Tensor]:
    x, y, loss = case.x, case.y, case.loss
    p = {n: t.clone().requires_grad_() for n, t in case.coder._asdict().items() if isinstance(t, Tensor)}
    pre = ((x - p["b_dec"] if case.coder.centered else x) @ p["weight"].T + p["bias"]).relu()
    if case.activation == "batchtopk":
        cut = pre.detach().flatten().topk(len(x) * case.k).values[-1]
        acts = torch.where(pre >= cut, pre, 0.0)
    elif case.activation == "topk":
        acts = torch.where(pre >= pre.detach().topk(case.k).values[:, -1:], pre, 0.0)
    else:
        groups = pre.unflatten(1, (case.k, -1))
        acts = torch.where(groups == groups.detach().amax(-1, keepdim=True), groups, 0.0).flatten(1)
    offset = p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)
    residuals = [y - acts[:, :end] @ p["W_dec"][:end] - offset for end in loss.prefixes or (len(p["bias"]),)]
    fvus = torch.stack([r.square().sum() / loss.variance for r in residuals])
    auxk = torch.zeros_like(fvus[0])
    if loss.dead is not None:
        dead = pre[:, loss.dead]
        dead = torch.where(dead >= dead.detach().topk(loss.k_aux).values[:, -1:], dead, 0.0)
        error = dead @ p["W_dec"][loss.dead] - residuals[-1].detach()
        auxk = min(len(loss.dead) / loss.k_aux, 1) * error.square().sum() / loss.variance
    ((fvus.mean() + loss.alpha * auxk) * loss.share).backward()
    grads = {name: t.grad for name, t in p.items() if t.grad is not None}
    return {"fvus": fvus.detach(), "auxk": auxk.detach(), "fired": (acts > 0).any(0), **grads}


def joint(case: Case, implementation: str, **options) -> dict[str, Tensor]:
    sink = GradSink(torch.zeros_like(case.coder.weight), torch.zeros_like(case.coder.W_dec))
    out = coder_step(
        case.x, case.y, case.coder, case.loss, sink,
        k=case.k, activation=case.activation, implementation=implementation, **options,
    )  # fmt: skip
    assert sink.begun
    fvus = out.fvu[None] if out.prefix_fvus is None else out.prefix_fvus
    assert fvus[-1] == out.fvu
    results = {
        "fvus": fvus, "auxk": out.auxk, "fired": out.fired, "weight": sink.dW_enc, "bias": out.d_bias,
        "W_dec": sink.dW_dec, "b_dec": out.d_b_dec,
    }  # fmt: skip
    return results if out.d_skip is None else {**results, "W_skip": out.d_skip}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("implementation", "variant"),
    [(name, variant) for name in IMPLEMENTATIONS for variant in (VARIANTS if name != "triton" else ["batch", "both"])],
)
def test_losses_and_gradients_equal_autograd(implementation, variant, device):
    case = case_of(variant)
    truth = autograd(case)
    if implementation != "triton":
        got = joint(case, implementation)
        assert got.keys() == truth.keys()
        for name, want in truth.items():
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    case = to(case, torch.float32, "cpu")
    truth, plain = autograd(to(case, torch.float64, "cpu")), autograd(case)
    got = joint(to(case, torch.float32, device if implementation == "triton" else "cpu"), implementation)
    assert got.pop("fired").cpu().equal(truth.pop("fired"))
    for name, want in truth.items():
        assert_no_worse(got[name].cpu(), plain[name], want, floor=1e-6)


def test_two_tokens_of_the_cases_are_widened():
    case = case_of("batch")
    blocks = select_batch(case.x, case.coder, case.k, implementation="cpu")
    assert [tuple(block.acts.shape) for block in blocks] == [(9, 6), (1, 12), (1, 24)]
    assert [0 if block.tokens is None else block.tokens[-1].item() for block in blocks] == [9, 10, 0]
    assert sum(int((block.acts > 0).sum()) for block in blocks) == 11 * 3


@pytest.mark.parametrize("variant", ["batch", "both"])
def test_chunks_with_the_whole_batch_s_selection_add_up(variant):
    case = case_of(variant)._replace(loss=case_of(variant).loss._replace(dead=None))
    whole = joint(case, "cpu")
    blocks = select_batch(case.x, case.coder, case.k, parts=3, implementation="cpu")
    total: dict[str, Tensor] = {}
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        chunk = case._replace(x=case.x[begin:end], y=case.y[begin:end])
        for name, value in joint(chunk, "cpu", selected=part(blocks, begin, end)).items():
            total[name] = total[name] + value if name in total else value
    for name, want in whole.items():
        torch.testing.assert_close(total[name], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("implementation", "variant"), [("cpu", "batch"), ("cpu", "prefixes"), ("reference", "both"), ("triton", "both")]
)
def test_the_optimizer_s_step_inside_equals_a_step_on_the_gradients(implementation, variant, device):
    case = to(case_of(variant), torch.float32, device if implementation == "triton" else "cpu")
    grads = joint(case, implementation)
    rule, sphere = Adam(), case.coder.centered

    def rows(weight: Tensor, unit_rows: bool) -> Rows:
        return Rows(weight.clone(), rule.new_state(weight), unit_rows, None)

    matrices = rows(case.coder.weight, False), rows(case.coder.W_dec, sphere)
    step = RowStep(rule, 0.01, 1, *matrices)
    coder = case.coder._replace(weight=matrices[0].weight, W_dec=matrices[1].weight)
    coder_step(
        case.x, case.y, coder, case.loss, step, k=case.k, activation=case.activation, implementation=implementation
    )
    assert step.begun
    separate = rows(case.coder.weight, False), rows(case.coder.W_dec, sphere)
    RowStep(rule, 0.01, 1, *separate).rows(0, len(coder.bias), grads["weight"].clone(), grads["W_dec"].clone())
    for got, want in zip(matrices, separate, strict=True):
        torch.testing.assert_close(got.weight, want.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.state["exp_avg"], want.state["exp_avg"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("prefixes", [(5, 5, 37), (5, 36), (0, 37), (37, 5)])
def test_prefixes_that_do_not_fit_are_refused(prefixes):
    case = case_of("prefixes")
    with pytest.raises(ValueError, match="expected ascending prefixes that end with 37 latents"):
        joint(case._replace(loss=case.loss._replace(prefixes=prefixes)), "cpu")
