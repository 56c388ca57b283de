"""Hooks on real architectures: what is captured, where the forward stops, and that nothing is left behind."""

import pytest
import torch
from models import make_model
from torch import nn

from fastsae.errors import ArtifactError, HookpointError
from fastsae.hookpoints import layer_hookpoints, probe, resolve_hookpoints
from fastsae.hooks import run_hooked

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_wildcards_in_natural_order():
    model = make_model("gpt2")
    assert resolve_hookpoints(model, ["h.*.mlp.act"]) == ["h.0.mlp.act", "h.1.mlp.act", "h.2.mlp.act"]
    assert resolve_hookpoints(model, ["h.2.mlp", "h.0"]) == ["h.0", "h.2.mlp"]
    deep = make_model("gpt2")
    deep.transformer.h.extend(make_model("gpt2").transformer.h[0] for _ in range(8))
    assert resolve_hookpoints(deep, ["h.*.mlp.act"])[-2:] == [
        "h.9.mlp.act",
        "h.10.mlp.act",  # not after h.1
    ]


def test_unknown_hookpoints_list_close_ones():
    with pytest.raises(HookpointError, match=r"'h.*.mpl.act'; close matches: .*h.0.mlp.act.*fastsae hookpoints"):
        resolve_hookpoints(make_model("gpt2"), ["h.0", "h.*.mpl.act"])


def test_layers():
    model = make_model("gpt2")
    assert layer_hookpoints(model) == ["h.0", "h.1", "h.2"]
    assert layer_hookpoints(model, (2, 0)) == ["h.2", "h.0"]
    assert layer_hookpoints(make_model("llama")) == ["layers.0", "layers.1"]
    assert layer_hookpoints(make_model("bert")) == ["encoder.layer.0", "encoder.layer.1"]
    with pytest.raises(HookpointError, match="expected layers from 0 to 2, got 3"):
        layer_hookpoints(model, (0, 3))


def test_probe_finds_widths():
    found = probe(make_model("llama"), ["layers.0.self_attn", "layers.1.mlp", "layers.1.mlp.act_fn", "embed_tokens"])
    assert {name: (at.module, at.d_in, at.d_out, at.calls) for name, at in found.items()} == {
        "layers.0.self_attn": ("LlamaAttention", 32, 32, 1),  # its input comes as a keyword, its output as a tuple
        "layers.1.mlp": ("LlamaMLP", 32, 32, 1),
        "layers.1.mlp.act_fn": ("SiLUActivation", 48, 48, 1),
        "embed_tokens": ("Embedding", None, 32, 1),
    }


def test_modules_without_a_float_output_are_left_out():
    model = make_model("gpt2")
    assert "h" not in probe(model, ["h", "h.0"])  # a ModuleList is never called


def test_attention_weights_are_no_features():
    from transformers import BloomConfig, BloomModel

    model = BloomModel(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).eval()
    found = probe(model, ["h.0.self_attention.attention_dropout", "h.0.self_attention"])
    assert {name: at.d_out for name, at in found.items()} == {"h.0.self_attention": 16}


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gpt2", ["h.0", "h.1.mlp.act", "h.1.attn"]),
        ("llama", ["layers.0.self_attn", "layers.0.mlp"]),
        ("bert", ["encoder.layer.0.attention", "encoder.layer.1"]),
    ],
)
def test_captures_what_the_model_computes(architecture, names):
    model = make_model(architecture)
    captured = {}
    run_hooked(model, IDS, dict.fromkeys(names, 1), lambda name, _, out: captured.update({name: out}))
    truth = {}
    handles = [
        model.base_model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: truth.update({name: out[0] if isinstance(out, tuple) else out})
        )
        for name in names
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    for name in names:
        torch.testing.assert_close(captured[name], truth[name])


def test_stops_after_the_last_hookpoint_without_a_cache():
    model = make_model("gpt2")
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    cache = []
    model.transformer.h[0].register_forward_pre_hook(
        lambda _m, args, kwargs: cache.append([*args, *kwargs.values()]), with_kwargs=True
    )
    run_hooked(model, IDS, {"h.0.mlp.act": 1, "h.1.mlp.act": 1}, lambda *_: None)
    assert ran[-1] == "transformer.h.1.mlp.act"
    assert not any(name.startswith(("transformer.h.2", "lm_head", "transformer.h.1.mlp.c_proj")) for name in ran)
    assert not any("Cache" in type(value).__name__ for value in cache[0])


def test_unknown_call_counts_run_to_the_end():
    model, seen = make_model("gpt2"), []
    run_hooked(model, IDS, {"h.0": 0}, lambda name, *_: seen.append(name))
    assert seen == ["h.0"]


def _state(model: nn.Module):
    return {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    }, [(p.requires_grad, p.grad) for p in model.parameters()]


def test_leaves_the_model_as_it_was_also_after_an_exception():
    model = make_model("gpt2").train()
    model.transformer.h[1].eval()
    before = _state(model)
    run_hooked(model, IDS, {"h.1": 1}, lambda *_: None)
    assert _state(model) == before

    def fail(*_):
        assert not model.transformer.training
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        run_hooked(model, IDS, {"h.1": 1}, fail)
    assert _state(model) == before


def test_runs_in_eval_mode_without_gradients():
    model = make_model("gpt2").train()  # dropout would make two runs differ
    outs = []
    for _ in range(2):
        run_hooked(model, IDS, {"h.2": 1}, lambda _n, _i, out: outs.append(out))
    assert torch.equal(outs[0], outs[1])
    assert not outs[0].requires_grad


def test_attention_mask_reaches_the_model():
    model, outs = make_model("bert"), []
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for attention_mask in (None, mask):
        run_hooked(model, IDS, {"encoder.layer.1": 1}, lambda _n, _i, out: outs.append(out), attention_mask)
    assert not torch.allclose(outs[0][0], outs[1][0])
    torch.testing.assert_close(outs[0][1], outs[1][1])


def test_a_model_whose_forward_fails():
    model = make_model("gpt2")

    def fail(*_args, **_options):
        raise RuntimeError("boom\nand more")

    model.transformer.h[1].forward = fail
    with pytest.raises(ArtifactError, match="expected GPT2LMHeadModel to run on 2 token ids, got RuntimeError: boom; "):
        probe(model, ["h.0", "h.2"])
