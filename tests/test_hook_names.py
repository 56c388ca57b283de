"""Hugging Face module names and TransformerLens hook names, both ways."""

import pytest

from fastsae.compat.hook_names import from_transformer_lens, layer_of, to_transformer_lens
from fastsae.errors import HookpointError

SAME_PLACES = [
    ("h.3", "blocks.3.hook_resid_post", "gpt2"),
    ("layers.11", "blocks.11.hook_resid_post", "llama"),
    ("h.3.mlp.act", "blocks.3.mlp.hook_post", "gpt2"),
    ("layers.3.mlp.act_fn", "blocks.3.mlp.hook_post", "llama"),
    ("layers.3.mlp.act", "blocks.3.mlp.hook_post", "gpt_neox"),
    ("h.0.mlp", "blocks.0.hook_mlp_out", "gpt2"),
    ("layers.0.mlp", "blocks.0.hook_mlp_out", "llama"),
    ("h.7.attn", "blocks.7.hook_attn_out", "gpt2"),
    ("layers.7.self_attn", "blocks.7.hook_attn_out", "llama"),
    ("layers.7.attention", "blocks.7.hook_attn_out", "gpt_neox"),
    ("embed_tokens", "hook_embed", "llama"),
    ("wte", "hook_embed", "gpt2"),
]


@pytest.mark.parametrize(("hookpoint", "hook_name", "family"), SAME_PLACES)
def test_both_ways(hookpoint, hook_name, family):
    assert to_transformer_lens(hookpoint) == hook_name
    assert from_transformer_lens(hook_name, family) == hookpoint


def test_the_wrapper_around_the_base_model_does_not_matter():
    assert to_transformer_lens("transformer.h.2.mlp") == "blocks.2.hook_mlp_out"
    assert to_transformer_lens("model.layers.2") == "blocks.2.hook_resid_post"


@pytest.mark.parametrize("hookpoint", ["h.3.ln_1", "ln_f", "h", "h.x.mlp", "", "h.3.mlp.c_fc"])
def test_places_without_a_counterpart_are_refused(hookpoint):
    with pytest.raises(HookpointError, match="names look like"):
        to_transformer_lens(hookpoint)


@pytest.mark.parametrize("hook_name", ["blocks.3.ln1.hook_scale", "hook_pos_embed", "blocks.x.hook_mlp_out", ""])
def test_hooks_without_a_counterpart_are_refused(hook_name):
    with pytest.raises(HookpointError, match=r"expected blocks.N. with one of"):
        from_transformer_lens(hook_name)
    with pytest.raises(HookpointError, match="expected one of gpt2, llama, gpt_neox"):
        from_transformer_lens(hook_name, "t5")  # type: ignore[arg-type]


def test_layer_of():
    names = ["h.3.mlp", "model.layers.12", "blocks.0.hook_mlp_out", "wte", None, "trainer_0"]
    assert [layer_of(name) for name in names] == [3, 12, 0, None, None, None]
