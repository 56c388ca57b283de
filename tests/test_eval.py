"""Evaluation against direct float64 computations, on every kind of place that a coder can sit in."""

import math

import pytest
import torch
from datasets import Dataset
from models import make_model, token_rows
from torch.nn.functional import cross_entropy, kl_div

from fastsae import EvalConfig, FastSae, SaeConfig, TranscoderConfig, evaluate
from fastsae.errors import ArtifactError, CheckpointError, ConfigError, HookpointError
from fastsae.eval.estimate import Estimate, ratio
from fastsae.eval.reconstruction import decoder_cosines

ROWS, LENGTH = 6, 12


def make_coder(
    width: int, *, transcode: bool = False, seed: int = 5, latents: int = 40, d_in: int | None = None
) -> FastSae:
    torch.manual_seed(seed)
    cfg = (TranscoderConfig if transcode else SaeConfig)(num_latents=latents, k=4)
    coder = FastSae(d_in or width, cfg, d_out=width)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return coder


def first(output):
    return output[0] if isinstance(output, tuple) else output


def direct_logits(model, ids, replacements, mask=None, seen=None):
    """Logits with outputs replaced by plain PyTorch hooks; inputs may come as the keyword hidden_states."""

    def make_hook(name, replace):
        def hook(_module, args, kwargs, output):
            x, y = args[0] if args else kwargs["hidden_states"], first(output)
            if seen is not None:
                seen[name] = (x, y)
            new = replace(x, y)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = [
        model.base_model.get_submodule(name).register_forward_hook(make_hook(name, replace), with_kwargs=True)
        for name, replace in replacements.items()
    ]
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits.double()
    finally:
        for handle in handles:
            handle.remove()


def direct_ce(logits, ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def direct_kl(clean, logits):
    return (
        kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()
    )


CASES = [
    ("gpt2", "h.1", False),  # the residual stream; a tuple in some versions of transformers
    ("gpt2", "h.0.mlp", False),
    ("gpt2", "h.1.mlp.act", False),
    ("gpt2", "h.1.attn", False),  # a tuple
    ("gpt2", "h.2.mlp", True),
    ("gpt2", "h.2.mlp.c_fc", True),  # two widths
    ("llama", "layers.0.self_attn", False),  # a tuple; its input comes as a keyword
    ("llama", "layers.1.self_attn", True),
    ("llama", "layers.1.mlp.act_fn", False),
    ("llama", "layers.1", False),
]


@pytest.mark.parametrize(("architecture", "hookpoint", "transcode"), CASES)
def test_agrees_with_a_direct_float64_computation(architecture, hookpoint, transcode):
    model, rows = make_model(architecture), token_rows(ROWS, LENGTH)
    ids = rows["input_ids"][:]
    seen = {}
    clean = direct_logits(model, ids, {hookpoint: lambda _x, y: y}, seen=seen)
    x, y = seen[hookpoint]
    coder = make_coder(y.shape[-1], transcode=transcode, d_in=x.shape[-1] if transcode else None)
    (row,) = evaluate({hookpoint: coder}, model, rows, EvalConfig(batch_size=4), progress=False).coders

    source = (x if transcode else y).flatten(0, 1)
    with torch.no_grad():
        out = coder(source, y.flatten(0, 1))
    target = y.flatten(0, 1).double()
    mean = target.mean(0)
    fvu = ((target - out.sae_out.double()).square().sum() / (target - mean).square().sum()).item()
    active = out.latent_acts > 0
    counts = torch.bincount(out.latent_indices[active], minlength=40)
    got = row.reconstruction
    assert got.tokens == ROWS * LENGTH
    assert got.fvu.value == pytest.approx(fvu, rel=1e-5)
    assert got.l0.value == pytest.approx(active.sum().item() / len(target))
    assert (got.density.latents, got.density.dead) == (40, int((counts == 0).sum()))
    assert got.density.dense == int((counts > 0.1 * len(target)).sum())
    assert sum(got.density.counts) == 40 - got.density.dead

    shape = y.shape
    ways = {
        "grafted": lambda _x, _y: out.sae_out.reshape(shape).to(y.dtype),
        "zero": lambda _x, y: torch.zeros_like(y),
        "mean": lambda _x, y: mean.to(y.dtype).expand_as(y),
    }
    logits = {name: direct_logits(model, ids, {hookpoint: way}) for name, way in ways.items()}
    ce = {name: direct_ce(values, ids) for name, values in {**logits, "clean": clean}.items()}
    loss = row.cross_entropy
    for name, value in ce.items():
        assert getattr(loss, name).value == pytest.approx(value, rel=2e-6), name
    assert loss.kl.value == pytest.approx(direct_kl(clean, logits["grafted"]), rel=1e-3, abs=1e-7)
    assert loss.kl_zero.value == pytest.approx(direct_kl(clean, logits["zero"]), rel=1e-3, abs=1e-7)
    assert abs(ce["grafted"] - ce["clean"]) > 1e-5  # the graft reaches the loss
    if abs(ce["zero"] - ce["clean"]) > 1e-3:
        recovered = (ce["zero"] - ce["grafted"]) / (ce["zero"] - ce["clean"])
        assert loss.recovered.value == pytest.approx(recovered, rel=1e-2)


def test_all_coders_grafted_together_see_each_others_outputs():
    model, rows = make_model("gpt2"), token_rows(ROWS, LENGTH)
    ids = rows["input_ids"][:]
    coders = {"h.0": make_coder(32, seed=1), "h.1.mlp": make_coder(32, seed=2, transcode=True)}
    evaluation = evaluate(coders, model, rows, EvalConfig(batch_size=4), progress=False)
    (joint,) = evaluation.together
    logits = direct_logits(
        model,
        ids,
        {"h.0": lambda _x, y: coders["h.0"](y).sae_out, "h.1.mlp": lambda x, _y: coders["h.1.mlp"](x).sae_out},
    )
    zero = direct_logits(model, ids, dict.fromkeys(coders, lambda _x, y: torch.zeros_like(y)))
    assert joint.names == ("h.0", "h.1.mlp")
    assert joint.cross_entropy.grafted.value == pytest.approx(direct_ce(logits, ids), rel=2e-6)
    assert joint.cross_entropy.zero.value == pytest.approx(direct_ce(zero, ids), rel=2e-6)
    alone = [row.cross_entropy.grafted.value for row in evaluation.coders]
    assert joint.cross_entropy.grafted.value not in alone


def test_seeds_are_grafted_together_by_seed_and_folders_stand_side_by_side():
    model, rows = make_model("gpt2"), token_rows(3, 8)
    seeds = {f"h.{i}/seed{s}": make_coder(32, seed=s) for i in (0, 1) for s in (0, 1)}
    one = {"h.0": make_coder(32, seed=7)}
    evaluation = evaluate({"a": seeds, "b": one}, model, rows, progress=False)
    assert [(row.coders, row.name) for row in evaluation.coders] == [("a", n) for n in seeds] + [("b", "h.0")]
    assert [joint.names for joint in evaluation.together] == [("h.0/seed0", "h.1/seed0"), ("h.0/seed1", "h.1/seed1")]
    alone = evaluate(one, model, rows, progress=False).coders[0]
    assert evaluation.coders[-1].cross_entropy == alone.cross_entropy
    assert evaluation.coders[-1].reconstruction == alone.reconstruction


def test_masked_and_excluded_tokens_are_not_measured_nor_replaced():
    model, rows = make_model("gpt2"), token_rows(4, 10)
    ids = rows["input_ids"][:]
    ids[:, 0] = 7
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    coder = make_coder(32)
    cfg = EvalConfig(batch_size=3, exclude_tokens=(7,))
    (row,) = evaluate({"h.1": coder}, model, data, cfg, progress=False).coders
    kept = mask.bool() & (ids != 7)
    seen = {}
    direct_logits(model, ids, {"h.1": lambda _x, y: y}, mask, seen)
    y = seen["h.1"][1]
    target = y[kept].double()
    with torch.no_grad():
        residual = target - coder(y[kept]).sae_out.double()
    fvu = (residual.square().sum() / (target - target.mean(0)).square().sum()).item()
    assert row.reconstruction.tokens == int(kept.sum()) == 32
    assert row.reconstruction.fvu.value == pytest.approx(fvu, rel=1e-5)
    logits = direct_logits(model, ids, {"h.1": lambda _x, y: torch.where(kept[..., None], coder(y).sae_out, y)}, mask)
    predicts = mask[:, 1:].bool() & mask[:, :-1].bool()
    ce = cross_entropy(logits[:, :-1][predicts], ids[:, 1:][predicts]).item()
    assert row.cross_entropy.grafted.value == pytest.approx(ce, rel=2e-6)


def test_a_perfect_coder_changes_nothing():
    """As many latents as dimensions, up and down: TopK of all of them is the identity."""
    model, rows = make_model("gpt2"), token_rows(3, 8)
    coder = FastSae(32, SaeConfig(num_latents=64, k=64))
    eye = torch.eye(32)
    with torch.no_grad():
        coder.encoder.weight.copy_(torch.cat([eye, -eye]))
        coder.W_dec.copy_(torch.cat([eye, -eye]))
    (row,) = evaluate({"h.1": coder}, model, rows, progress=False).coders
    assert row.reconstruction.fvu.value == pytest.approx(0, abs=1e-10)
    assert row.cross_entropy.recovered.value == pytest.approx(1, abs=1e-4)
    assert row.cross_entropy.kl.value == pytest.approx(0, abs=1e-8)
    assert row.reconstruction.l0.value == pytest.approx(32, abs=0.5)


def test_without_losses_a_base_model_is_enough():
    model, rows = make_model("bert"), token_rows(3, 8)
    evaluation = evaluate({"encoder.layer.0": make_coder(32)}, model, rows, EvalConfig(ce=False), progress=False)
    assert evaluation.together == ()
    assert evaluation.coders[0].cross_entropy is None
    with pytest.raises(ConfigError, match="expected a model with an LM head, got BertModel"):
        evaluate({"encoder.layer.0": make_coder(32)}, model, rows, progress=False)


def test_the_model_is_restored_also_after_an_error():
    model, rows = make_model("gpt2").train(), token_rows(3, 8)
    model.transformer.h[1].eval()

    def state():
        return {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}

    before, coder = state(), make_coder(32)
    evaluate({"h.1": coder}, model, rows, progress=False)
    assert state() == before
    calls = []

    def fail(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 2:  # inside a grafted pass
            raise RuntimeError("broken coder")
        return FastSae.forward(coder, *_args, **_kwargs)

    coder.forward = fail
    with pytest.raises(RuntimeError, match="broken coder"):
        evaluate({"h.1": coder}, model, rows, progress=False)
    assert state() == before


def test_coders_of_other_places_are_refused():
    model, rows, coder = make_model("gpt2"), token_rows(2, 8), make_coder(32)
    coder.notes = {"model": "gpt2", "hookpoint": "h.0"}
    with pytest.raises(CheckpointError, match="h.1: expected a coder of this hookpoint .h.1., got one trained on h.0"):
        evaluate({"h.1": coder}, model, rows, progress=False)
    with pytest.raises(CheckpointError, match="expected a coder of org/other, got one trained on gpt2"):
        evaluate({"h.0": coder}, model, rows, model_name="org/other", progress=False)
    evaluate({"h.0": coder}, model, rows, EvalConfig(ce=False), model_name="openai-community/gpt2", progress=False)
    forced = evaluate({"h.1": coder}, model, rows, EvalConfig(ce=False, force=True), progress=False)
    assert forced.coders[0].hookpoint == "h.1"
    with pytest.raises(CheckpointError, match="expected a coder of width 128 .*, got one of width 32"):
        evaluate({"h.0.mlp.act": coder}, model, rows, EvalConfig(force=True), progress=False)
    with pytest.raises(HookpointError, match="close matches"):
        evaluate({"h.1.mpl": coder}, model, rows, EvalConfig(force=True), progress=False)
    with pytest.raises(ArtifactError, match="at least one sequence"):
        evaluate({"h.0": coder}, model, token_rows(0, 8), progress=False)


def test_intervals_cover_what_they_claim():
    """The linearised interval of a ratio against what redrawing the sequences gives."""
    generator = torch.Generator().manual_seed(0)
    misses = 0
    for _ in range(400):
        bottom = torch.rand(60, generator=generator, dtype=torch.float64) + 0.5
        top = bottom * (0.3 + 0.1 * torch.randn(60, generator=generator, dtype=torch.float64))
        estimate = ratio(top, bottom)
        misses += not estimate.low <= 0.3 <= estimate.high
    assert 400 * 0.02 <= misses <= 400 * 0.09  # 5 % are meant to miss
    equal = ratio(torch.tensor([1.0, 2.0, 6.0]).double(), torch.ones(3).double())
    assert equal.value == 3
    assert equal.margin == pytest.approx(1.959964 * math.sqrt(7 / 3))  # sample variance 7 over 3
    assert math.isnan(ratio(torch.ones(1).double(), torch.ones(1).double()).low)
    assert Estimate(0.25, 0.2, 0.3).complement() == (0.75, 0.7, 0.8)


def test_decoder_cosines():
    torch.manual_seed(0)
    W = torch.randn(300, 7)
    W[5] = 3 * W[200]
    W[17] = 0
    rows = W.double() / W.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-1)
    largest = cosines.amax(1)
    got = decoder_cosines(W)
    assert got.rows == 300
    assert got.mean == pytest.approx(largest.mean().item(), abs=1e-6)
    assert got.median == pytest.approx(largest.quantile(0.5).item(), abs=1e-6)
    assert got.largest == pytest.approx(1, abs=1e-6)
    assert got.above_90 == pytest.approx((largest > 0.9).double().mean().item())
    assert decoder_cosines(W, sample=50).rows == 50
