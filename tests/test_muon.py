"""Muon: updates against float64 and sparsify's own, groups in one order, who warms up, who is refused."""

import pytest
import torch
from models import make_model, token_rows

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, TranscoderConfig
from fastsae.errors import ConfigError
from fastsae.optim import apply_gradients, learning_rates, make_optimizer, make_schedule

CFG = TrainConfig(optimizer="muon")
LR = 2e-3


def make_coders(*widths: int) -> list[FastSae]:
    torch.manual_seed(0)
    cfg = TranscoderConfig(num_latents=24, k=4, skip_connection=True)
    coders = [FastSae(width, cfg) for width in widths]
    for coder in coders:
        for parameter in coder.parameters():
            parameter.data.normal_()
    return coders


def orthogonalised(gradient: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz steps in float64."""
    X = gradient.double()
    tall = X.shape[0] > X.shape[1]
    X = (X.T if tall else X) / gradient.double().norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if tall else X


def test_steps_are_float64s_with_adam_beside(tmp_path):
    (coder,) = make_coders(7)
    optimizer = make_optimizer(CFG, [coder])
    wanted = {name: p.detach().double() for name, p in coder.named_parameters()}
    moments = {name: torch.zeros_like(p) for name, p in wanted.items()}
    vectors = {name: p.detach().clone().requires_grad_() for name, p in coder.named_parameters() if p.ndim == 1}
    adam = torch.optim.Adam(vectors.values(), lr=LR)
    for _ in range(3):
        for name, p in coder.named_parameters():
            p.grad = torch.randn_like(p)
            if p.ndim == 1:
                vectors[name].grad = p.grad.clone()
                continue
            moments[name] = 0.95 * moments[name] + 0.05 * p.grad
            update = orthogonalised(0.95 * moments[name] + 0.05 * p.grad)
            wanted[name] = wanted[name] * (1 - LR * 0.1) - LR * 0.2 * max(p.shape) ** 0.5 * update
        apply_gradients(optimizer, [coder])
        adam.step()
    size = LR * 0.2 * 24**0.5
    for name, p in coder.named_parameters():
        if p.ndim == 1:
            torch.testing.assert_close(p.detach(), vectors[name].detach())
        else:  # the iteration runs in bfloat16: a hundredth of three updates
            assert (p.double() - wanted[name]).abs().max() < 0.03 * size, name


def test_steps_are_sparsifys():
    muon = pytest.importorskip("sparsify.muon", reason="eai-sparsify is not installed; pip install 'fastsae[interop]'")
    (coder,), (twin,) = make_coders(16), make_coders(16)
    ours = make_optimizer(CFG, [coder])
    theirs = muon.Muon([p for p in twin.parameters() if p.ndim == 2], lr=LR)
    for _ in range(4):
        for p, q in zip(coder.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for (name, p), q in zip(coder.named_parameters(), twin.parameters(), strict=True):
        if p.ndim == 2:
            assert (p - q).abs().max() < 0.02 * 4 * LR * 0.2 * 24**0.5, name


def test_parameters_come_in_the_order_of_the_coders():
    coders = make_coders(5, 9, 3)
    optimizer = make_optimizer(CFG, coders)
    matrices, vectors = optimizer.param_groups
    parameters = [p for coder in coders for p in coder.parameters()]
    assert [id(p) for p in matrices["params"]] == [id(p) for p in parameters if p.ndim == 2]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in parameters if p.ndim == 1]
    assert make_optimizer(CFG, []).param_groups[0]["params"] == []  # of a process without coders


def test_only_vectors_warm_up_and_both_rates_fall_to_the_end():
    optimizer = make_optimizer(CFG, make_coders(5))
    schedule = make_schedule(CFG, optimizer, 100)  # warms up for 10 steps
    rates = []
    for _ in range(100):
        rates.append(learning_rates(optimizer))
        optimizer.step()
        schedule.step()
    matrices, vectors = zip(*rates, strict=True)
    assert matrices[:2] == pytest.approx([LR, LR * 0.99])
    assert vectors[0] == pytest.approx(LR / 11)
    assert vectors[10] == pytest.approx(LR)
    assert (matrices[-1], vectors[-1]) == pytest.approx((LR / 100, LR / 90))


def test_training_lowers_fvu_on_the_sphere(tmp_path):
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4), optimizer="muon", lr=0.02, hookpoints=("h.1",), batch_size=4, log_every=5,
        save_dir=str(tmp_path), run_name="run",
    )  # fmt: skip
    trainer = Trainer(cfg, token_rows(120, 16), make_model("gpt2"))
    (row,) = trainer.fit(progress=False).coders
    assert row.fvu < 0.6
    W_dec = trainer.coders["h.1"].W_dec
    assert W_dec is not None
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(64))


def test_what_muon_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="distribute_latents: expected another optimizer, got muon, whose update"):
        TrainConfig(optimizer="muon", distribute_latents=2)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match="optimizer: expected torch 2.9 or newer for 'muon', got"):
        make_optimizer(CFG, make_coders(5))


@pytest.mark.parametrize(("width", "latents"), [(1, 1), (3, 2), (64, 32), (100, 64), (768, 512), (4096, 2048)])
def test_auxk_takes_a_power_of_two_close_to_half_the_width(width, latents):
    assert SaeConfig().k_aux_for(width) == latents
