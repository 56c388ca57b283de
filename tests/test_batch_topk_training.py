"""BatchTopK and Matryoshka coders as users meet them: trained, thresholded, saved, refused; by value in float64."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import make_model, token_rows
from torch import Tensor

from fastsae import FastSae, SaeConfig, TrainConfig, Trainer, evaluate
from fastsae.compat import convert
from fastsae.distributed.latent_peers import latent_bounds
from fastsae.distributed.strategies import make_strategy
from fastsae.distributed.world import World
from fastsae.encode import strongest_latents
from fastsae.errors import CheckpointError, ConfigError
from fastsae.eval.config import EvalConfig
from fastsae.metrics import TrainingMetrics
from fastsae.micro_batches import MicroBatches

D, L, K, N = 12, 40, 3, 21


def make_coder(dtype=torch.float64, **options) -> FastSae:
    torch.manual_seed(0)
    cfg = SaeConfig(**{"activation": "batchtopk", "num_latents": L, "k": K, **options})
    coder = FastSae(D, cfg, dtype=dtype)
    with torch.no_grad():
        coder.encoder.bias.normal_(std=0.3)
        coder.b_dec.normal_()
    return coder


def rows(count: int = N, dtype=torch.float64) -> Tensor:
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x[0] *= 5  # takes far more than its share
    return x


def dense(acts: Tensor, indices: Tensor) -> Tensor:
    return acts.new_zeros(len(acts), L).scatter(1, indices, acts)


def losses_by_hand(coder: FastSae, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """(each prefix's FVU, the smallest selected activation), differentiable, from all N·L scores."""
    pre = ((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu()
    cut = pre.detach().flatten().sort(descending=True).values[len(x) * K - 1]
    acts, variance = torch.where(pre >= cut, pre, 0.0), (x - x.mean(0)).square().sum()
    ends = [*coder.cfg.matryoshka_widths, *([] if L in coder.cfg.matryoshka_widths else [L])]
    assert coder.W_dec is not None
    outs = [acts[:, :end] @ coder.W_dec[:end] + coder.b_dec for end in ends]
    return [(x - out).square().sum() / variance for out in outs], cut


@pytest.mark.parametrize("widths", [(), (7, 25), (7, L)], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_losses_and_threshold_of_a_batch_whole_or_in_parts(widths, parts):
    coder, x = make_coder(matryoshka_widths=widths), rows()
    metrics = TrainingMetrics("h.0", coder)
    variance = (x - x.mean(0)).square().sum()
    MicroBatches(parts).train(
        coder, x, x, metrics, TrainConfig(), variance=variance, count=N, share=1.0, optimizer=None, inside=False, k=K
    )
    fvus, cut = losses_by_hand(coder, x)
    parameters = dict(coder.named_parameters())
    grads = torch.autograd.grad(torch.stack(fvus).mean(), list(parameters.values()))
    for (name, parameter), want in zip(parameters.items(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(coder.threshold, cut.float())
    values, fvus = metrics.read(10), torch.stack(fvus).tolist()
    assert values["fvu"] == pytest.approx(fvus[-1], rel=1e-6)
    assert {n: v for n, v in values.items() if n.startswith("fvu_")} == pytest.approx(
        {f"fvu_{width}": fvu for width, fvu in zip(widths, fvus[:-1], strict=False)}, rel=1e-6
    )


def test_the_threshold_is_a_running_mean_with_a_floor():
    coder = make_coder()
    for least, weight, want in [(2.0, 1.0, 2.0), (4.0, 0.5, 3.0), (torch.inf, 0.5, 3.0), (5.0, 0.25, 3.5)]:
        coder.learn_threshold(torch.tensor(least), weight)
        assert coder.threshold.item() == want


@pytest.mark.parametrize("transcode", [False, True])
def test_at_inference_every_activation_above_the_threshold_is_active(transcode):
    coder, x = make_coder(transcode=transcode, skip_connection=transcode), rows().view(3, 7, D)
    assert coder.W_dec is not None
    with torch.no_grad():
        coder.W_dec.normal_()
    flat = x.flatten(0, 1)
    pre = ((flat if transcode else flat - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu()
    cut = pre.detach().flatten().sort(descending=True).values[N * K - 1]
    unset = dense(*(t.flatten(0, 1) for t in coder.encode(x)[:2]))
    torch.testing.assert_close(unset, torch.where(pre >= cut, pre, 0.0))  # untrained: the largest of the batch
    coder.threshold.fill_(0.8)
    acts, indices, all_acts = coder.encode(x, return_pre_acts=True)
    assert all_acts is not None
    torch.testing.assert_close(all_acts.flatten(0, 1), pre)
    want = pre * (pre > coder.threshold)
    torch.testing.assert_close(dense(acts.flatten(0, 1), indices.flatten(0, 1)), want)
    alone = coder.encode(x[1, 2:3])  # a token does not depend on the others
    torch.testing.assert_close(dense(*alone[:2])[0], want[9])
    out = coder(x)
    torch.testing.assert_close(out.sae_out.flatten(0, 1), want @ coder.W_dec + coder.b_dec)
    assert out.latent_acts.shape == acts.shape


def make_trainer(folder, **options) -> Trainer:
    values = {
        "sae": SaeConfig(activation="batchtopk", num_latents=64, k=4, matryoshka_widths=(16,)), "batch_size": 4,
        "hookpoints": ("h.0", "h.1.mlp"), "lr": 0.01, "save_dir": str(folder), "run_name": "run", **options,
    }  # fmt: skip
    return Trainer(TrainConfig(**values), token_rows(84, 8), make_model("gpt2"))


def test_a_run_learns_a_threshold_that_evaluation_encoding_and_info_use(tmp_path):
    trainer = make_trainer(tmp_path, log_every=5)
    smallest: list[float] = []
    learn = FastSae.learn_threshold

    def seen(coder, least, weight):
        if coder is trainer.coders["h.0"]:
            smallest.append(float(least))
            assert weight == max(0.01, 1 / len(smallest))
        learn(coder, least, weight)

    FastSae.learn_threshold = seen  # type: ignore[method-assign]
    try:
        summary = trainer.fit(progress=False)
    finally:
        FastSae.learn_threshold = learn  # type: ignore[method-assign]
    coder = FastSae.load_from_disk(summary.folder / "h.0")
    assert coder.cfg.matryoshka_widths == (16,)
    assert len(smallest) == trainer.total_steps
    assert coder.threshold.item() == pytest.approx(sum(smallest) / len(smallest), rel=1e-5)
    record = json.loads((summary.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["fvu_16/h.0"] > record["fvu/h.0"] > 0
    assert 2 < summary.coders[0].l0 < 8  # k = 4 on average, about

    model, tokens = make_model("gpt2"), token_rows(6, 8, seed=5)
    hidden = []
    handle = model.transformer.h[0].register_forward_hook(lambda _m, _i, out: hidden.append(out))
    model(torch.stack(list(tokens["input_ids"])))
    handle.remove()
    y = (hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]).detach().double().flatten(0, 1)
    wide = {name: t.double() for name, t in coder.state_dict().items()}
    pre = ((y - wide["b_dec"]) @ wide["encoder.weight"].T + wide["encoder.bias"]).relu()
    acts = pre * (pre > wide["threshold"])
    fvu = (y - acts @ wide["W_dec"] - wide["b_dec"]).square().sum() / (y - y.mean(0)).square().sum()
    measured = evaluate({"h.0": coder}, model, tokens, EvalConfig(batch_size=4), progress=False).coders[0]
    assert measured.reconstruction.fvu.value == pytest.approx(float(fvu), rel=1e-5)
    assert measured.reconstruction.l0.value == pytest.approx(float((acts > 0).sum(1).double().mean()))
    firings = strongest_latents({"h.0": coder}, model, tokens[0]["input_ids"], top=3)["h.0"]
    strongest = acts[:8].topk(3)
    for token, firing in enumerate(firings):
        assert [f.activation for f in firing] == pytest.approx([v for v in strongest.values[token].tolist() if v > 0])
    as_read = convert.load(summary.folder / "h.0")
    assert (as_read.activation, as_read.k) == ("jumprelu", 4)
    assert (as_read.threshold == coder.threshold).all()


def test_a_file_without_its_threshold_is_refused_and_an_untrained_coder_is_not_converted(tmp_path):
    from safetensors.torch import load_file, save_file

    coder = make_coder(torch.float32)
    coder.save_to_disk(tmp_path / "a")
    with pytest.raises(CheckpointError, match="whose threshold training has set"):
        convert.load(tmp_path / "a")
    tensors = load_file(tmp_path / "a/sae.safetensors")
    del tensors["threshold"]
    save_file(tensors, tmp_path / "a/sae.safetensors")
    values = json.loads((tmp_path / "a/cfg.json").read_text())
    del values["fastsae"]
    (tmp_path / "a/cfg.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"expected threshold \[\] from cfg.json, got nothing"):
        FastSae.load_from_disk(tmp_path / "a")


def test_patterns_choose_widths_and_activation(tmp_path):
    trainer = make_trainer(
        tmp_path, sae=SaeConfig(num_latents=64, k=4),
        set=("h.0:activation=batchtopk,matryoshka_widths=8+32|16", "h.1.mlp:matryoshka_widths=8"),
    )  # fmt: skip
    cfgs = {name: (spec.sae.activation, spec.sae.matryoshka_widths) for name, spec in trainer.specs.items()}
    assert cfgs == {
        "h.0/matryoshka_widths8+32": ("batchtopk", (8, 32)), "h.0/matryoshka_widths16": ("batchtopk", (16,)),
        "h.1.mlp": ("topk", (8,)),
    }  # fmt: skip
    trainer.fit(progress=False)
    assert trainer.coders["h.0/matryoshka_widths16"].threshold > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "batchtopk", "multi_topk": True}, "multi_topk: expected topk or groupmax .* got batchtopk"),
        ({"matryoshka_widths": (8,), "multi_topk": True}, "multi_topk: .* got Matryoshka widths"),
        (
            {"matryoshka_widths": (8, 8)},
            r"matryoshka_widths: expected ascending numbers of latents above 0, got",
        ),
        ({"matryoshka_widths": (0, 8)}, "matryoshka_widths: expected ascending"),
        ({"matryoshka_widths": (8, 65), "num_latents": 64}, "expected at most the 64 latents there are, got 65"),
    ],
)
def test_what_does_not_combine_is_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        SaeConfig(**options)


def test_where_no_process_sees_the_whole_batch_it_is_refused(tmp_path):
    cfg = SaeConfig(activation="batchtopk")
    specs = {"h.0": SimpleNamespace(sae=SaeConfig(), width=D), "h.1": SimpleNamespace(sae=cfg, width=D)}
    with pytest.raises(ConfigError, match="h.1: expected --distribute-modules for batchtopk in several processes"):
        make_strategy(TrainConfig(), World(0, 2), specs, torch.device("cpu"))  # type: ignore[arg-type]
    for bad in (cfg, SaeConfig(matryoshka_widths=(8,))):
        with pytest.raises(ConfigError, match="distribute_latents: expected topk or groupmax of one width"):
            latent_bounds(bad, D, 2)
