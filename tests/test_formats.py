"""One weight set through every format and back computes the same; what would be lost is refused, and says why."""

import json

import pytest
import torch
import yaml
from coders import D, K, L, assert_computes, inputs, make_coder, truth
from safetensors.torch import load_file, save_file

from fastsae import FastSae, SaeConfig, TranscoderConfig
from fastsae.compat import convert
from fastsae.compat.coder import Coder
from fastsae.compat.formats import sparsify
from fastsae.errors import ArtifactError, CheckpointError, FastsaeError

LOSSLESS = {
    "sparsify": [
        {}, {"activation": "groupmax"}, {"skip": True}, {"centered": False}, {"transcode": True},
        {"transcode": True, "skip": True},
    ],
    "saelens": [
        {}, {"activation": "jumprelu"}, {"activation": "relu"}, {"centered": False}, {"layer_norm": True},
        {"transcode": True}, {"transcode": True, "skip": True}, {"transcode": True, "d_out": 24},
        {"activation": "relu", "transcode": True, "d_out": 24, "skip": True},
        {"activation": "jumprelu", "transcode": True, "d_out": 24},
        {"activation": "jumprelu", "transcode": True, "skip": True},
    ],
    "dictionary_learning": [
        {}, {"centered": False}, {"activation": "relu"}, {"activation": "jumprelu"},
        {"activation": "jumprelu", "centered": False},
    ],
    "openai": [{"layer_norm": True}, {"activation": "relu"}, {"layer_norm": True, "centered": False}],
    "circuit_tracer": [
        {"transcode": True, "hookpoint": "h.0.mlp"}, {"transcode": True, "skip": True, "hookpoint": "h.0.mlp"},
        {"activation": "relu", "transcode": True, "hookpoint": "h.0.mlp"},
        {"activation": "jumprelu", "transcode": True, "skip": True, "hookpoint": "h.0.mlp"},
    ],
}  # fmt: skip
CASES = [(to, facts) for to, kinds in LOSSLESS.items() for facts in kinds]


def moves_bias(to: str, coder: Coder) -> bool:
    """Whether the format holds this kind only with W_enc b_dec moved into the bias."""
    return convert.FORMATS[to].fit(coder)[0].centered != coder.centered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("to", "facts"), CASES, ids=str)
def test_there_and_back(tmp_path, to, facts, dtype):
    coder = make_coder(**facts, dtype=dtype)
    if dtype != torch.float32 and moves_bias(to, coder):
        with pytest.raises(CheckpointError, match="rounds it"):
            convert.save({"": coder}, tmp_path / "out", to)
        return
    assert convert.save({"": coder}, tmp_path / "out", to) == []
    back = convert.load(tmp_path / "out")
    assert [at.format for at in convert.find(tmp_path / "out").values()] == [to]
    assert_computes(back, *truth(coder, inputs()), inputs())
    assert {name: t.dtype for name, t in back.tensors().items()} == {
        name: t.dtype for name, t in coder.tensors().items()
    }
    if not moves_bias(to, coder):
        assert all(torch.equal(tensor, back.tensors()[name]) for name, tensor in coder.tensors().items())
    assert (back.activation, back.k, back.transcode) == (coder.activation, coder.k, coder.transcode)
    if to != "openai":  # which has no room for them
        assert (back.hookpoint, back.model) == (coder.hookpoint, "gpt2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("route", "facts"),
    [
        (["saelens", "dictionary_learning", "sparsify"], {}),
        (["dictionary_learning", "saelens", "sparsify", "saelens"], {}),
        (["circuit_tracer", "sparsify", "saelens"], {"transcode": True, "hookpoint": "h.0.mlp"}),
        (["saelens", "circuit_tracer", "sparsify"], {"transcode": True, "skip": True, "hookpoint": "h.0.mlp"}),
        (["dictionary_learning", "saelens"], {"activation": "jumprelu", "centered": False}),
        (["openai", "saelens", "openai"], {"layer_norm": True}),
        (["saelens", "circuit_tracer"], {"activation": "jumprelu", "transcode": True, "hookpoint": "h.0.mlp"}),
    ],
    ids=str,
)
def test_a_chain_of_formats_is_bit_exact(tmp_path, route, facts, dtype):
    coder = last = make_coder(**facts, dtype=dtype)
    for i, to in enumerate(route):
        convert.save({"": last}, tmp_path / str(i), to)
        last = convert.load(tmp_path / str(i))
    assert_computes(last, *truth(coder, inputs()), inputs())
    assert torch.equal(last.W_enc, coder.W_enc)
    assert torch.equal(last.W_dec, coder.W_dec)


@pytest.mark.parametrize(
    ("to", "facts", "reason"),
    [
        ("saelens", {"activation": "groupmax"}, "no groupmax"),
        ("saelens", {"skip": True}, "W_skip is dropped"),
        ("dictionary_learning", {"activation": "groupmax"}, "no groupmax"),
        ("dictionary_learning", {"skip": True}, "W_skip is dropped"),
        ("dictionary_learning", {"layer_norm": True}, "layer norm"),
        ("openai", {}, "normalises its input"),
        ("openai", {"skip": True, "layer_norm": True}, "W_skip is dropped"),
        ("sparsify", {"activation": "jumprelu", "k": 3}, "written as TopK with k = 3"),
        ("sparsify", {"layer_norm": True}, "layer norm"),
        ("circuit_tracer", {"activation": "groupmax", "transcode": True, "hookpoint": "layers.0.mlp"}, "no groupmax"),
    ],
    ids=str,
)
def test_a_lossy_conversion_is_refused_and_can_be_forced(tmp_path, to, facts, reason):
    coder = make_coder(**facts)
    with pytest.raises(CheckpointError, match=f"without loss: .*{reason}.*--force"):
        convert.save({"": coder}, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    lost = convert.save({"": coder}, tmp_path / "out", to, force=True)
    assert len(lost) == 1
    assert reason in lost[0]
    assert torch.equal(convert.load(tmp_path / "out").W_enc, coder.W_enc)


@pytest.mark.parametrize(
    ("to", "facts", "reason"),
    [
        ("sparsify", {"activation": "relu"}, "no k is known"),
        ("sparsify", {"transcode": True, "d_out": 24}, "one width"),
        ("dictionary_learning", {"transcode": True}, "no transcoders"),
        ("openai", {"transcode": True}, "no transcoders"),
        ("openai", {"activation": "jumprelu"}, "no k is known"),
        ("circuit_tracer", {}, "this is an autoencoder"),
        ("circuit_tracer", {"transcode": True, "d_out": 24}, "one width"),
        ("circuit_tracer", {"transcode": True, "hookpoint": None}, "names none"),
        ("circuit_tracer", {"transcode": True, "hookpoint": "h.3.mlp"}, "every layer from 0"),
        ("gguf", {}, "expected a format among sparsify"),
    ],
    ids=str,
)
def test_an_impossible_conversion_is_refused_even_when_forced(tmp_path, to, facts, reason):
    with pytest.raises(CheckpointError, match=reason):
        convert.save({"": make_coder(**facts)}, tmp_path / "out", to, force=True)
    assert list(tmp_path.iterdir()) == []  # not even a half folder


# ---- files written by hand, from the formats' descriptions ----


def tensors():
    return make_coder().tensors()


def test_saelens_files(tmp_path):
    t = tensors()
    weights = {"W_enc": t["W_enc"].T.contiguous(), "b_enc": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_mlp_out"}
    cfg = {"architecture": "topk", "d_in": D, "d_sae": L, "k": K, "dtype": "float32", "metadata": metadata}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    coder = convert.load(tmp_path)
    assert coder.hook_name == "blocks.3.hook_mlp_out"
    assert_computes(coder, *truth(make_coder(), inputs()), inputs())

    old = {
        "d_in": D,
        "d_sae": L,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_point": "hook_embed",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    coder = convert.load(tmp_path / "cfg.json")  # before version 6; a file of the folder may be named
    assert (coder.activation, coder.k, coder.hook_name) == ("topk", K, "hook_embed")


def test_a_saelens_training_folder_is_read_as_it_would_be_saved_for_inference(tmp_path):
    t = tensors()
    scale = torch.linspace(0.2, 3, L)[:, None]
    weights = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["b_enc"],
        "W_dec": t["W_dec"] * scale,
        "b_dec": t["b_dec"],
    }
    weights["topk_threshold"] = torch.tensor(0.25, dtype=torch.float64)
    save_file(weights, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "matryoshka_batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "metadata": {"sae_lens_version": "6.1.0"}}))
    x = inputs().double()
    pre = ((x - t["b_dec"]) @ t["W_enc"].T.double() + t["b_enc"]) * scale.squeeze()
    acts = pre * (pre > 0.25)
    coder = convert.load(tmp_path)
    assert coder.k == 4
    assert_computes(coder, acts, (acts / scale.squeeze()) @ weights["W_dec"].double() + t["b_dec"], inputs())


def test_openai_files(tmp_path):
    t = make_coder(layer_norm=True).tensors()
    state = {
        "pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "encoder.weight": t["W_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(L, dtype=torch.long),
        "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }  # fmt: skip
    torch.save(state, tmp_path / "layer_3.pt")
    assert_computes(convert.load(tmp_path / "layer_3.pt"), *truth(make_coder(layer_norm=True), inputs()), inputs())
    torch.save({**state, "activation_state_dict": {"k": K, "postact_fn": "Identity"}}, tmp_path / "signed.pt")
    with pytest.raises(CheckpointError, match="TopK followed by ReLU, got 'Identity'"):
        convert.load(tmp_path / "signed.pt")


def test_fastsae_computes_what_the_neutral_coder_does():
    for cfg in (SaeConfig(num_latents=48, k=4), TranscoderConfig(num_latents=48, k=4, skip_connection=True)):
        coder = make_coder(transcode=cfg.transcode, skip=cfg.skip_connection)
        sae = sparsify.to_fastsae(coder)
        assert isinstance(sae, FastSae)
        acts, indices, _ = sae.encode(inputs())
        dense = torch.zeros(5, 7, L).scatter(-1, indices, acts)
        wanted, out = truth(coder, inputs())
        torch.testing.assert_close(dense.double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(inputs()).sae_out.double(), out, atol=1e-5, rtol=1e-5)
        assert_computes(sparsify.from_fastsae(sae), wanted, out, inputs())


# ---- runs, names, folders ----


def test_a_run_is_converted_whole_and_keeps_its_names(tmp_path):
    names = ["h.0.mlp", "h.1.mlp", "h.10.mlp/seed0", "h.10.mlp/seed1"]
    coders = {name: make_coder(hookpoint=name.partition("/")[0]) for name in names}
    convert.save(coders, tmp_path / "run", "sparsify")
    (tmp_path / "run/best/h.0.mlp").mkdir(parents=True)
    assert list(FastSae.load_many(tmp_path / "run", local=True)) == names
    done, lost = convert.convert(tmp_path / "run", tmp_path / "out", "saelens")
    assert (done, lost) == (names, [])
    assert list(convert.load_all(tmp_path / "out")) == names
    done, _ = convert.convert(tmp_path / "run", tmp_path / "one", "dictionary_learning", hookpoint="h.1.mlp")
    assert done == ["h.1.mlp"]
    with pytest.raises(CheckpointError, match=r"no coder 'h.2.mlp' .* holds: h.0.mlp"):
        convert.load(tmp_path / "run", "h.2.mlp")
    with pytest.raises(CheckpointError, match=r"expected one coder, found h.0.mlp, h.1.mlp"):
        convert.load(tmp_path / "run")


def test_a_transcoder_set_has_one_file_per_layer(tmp_path):
    coders = {f"h.{i}.mlp": make_coder(transcode=True, hookpoint=f"h.{i}.mlp", skip=True) for i in range(3)}
    convert.save(coders, tmp_path / "set", "circuit_tracer")
    config = yaml.safe_load((tmp_path / "set/config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set"
    assert (config["activation"], config["k"], config["model_name"]) == ("topk", K, "gpt2")
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")
    layer = load_file(tmp_path / "set/layer_1.safetensors")
    assert {name: list(t.shape) for name, t in layer.items()} == {
        "W_enc": [L, D], "W_dec": [L, D], "b_enc": [L], "b_dec": [D], "W_skip": [D, D]
    }  # fmt: skip
    assert list(convert.load_all(tmp_path / "set")) == list(coders)
    with pytest.raises(CheckpointError, match=r"every layer from 0 on, got h.0.mlp, h.2.mlp"):
        convert.save({name: coders[name] for name in ("h.0.mlp", "h.2.mlp")}, tmp_path / "gap", "circuit_tracer")


def test_a_folder_with_files_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    convert.save({"": make_coder()}, tmp_path / "out", "sparsify")  # an empty one will do
    with pytest.raises(ArtifactError, match="new or empty folder"):
        convert.save({"": make_coder()}, tmp_path / "out", "saelens")


def test_no_such_source(tmp_path):
    for source in (tmp_path / "nothing", "./nothing", "just-a-word"):
        with pytest.raises(CheckpointError, match="no such path"):
            convert.load(source)
    with pytest.raises(CheckpointError, match="expected coders of one of sparsify, saelens"):
        convert.load(tmp_path)
    with pytest.raises(FastsaeError):  # offline
        convert.load("org/some-repo", "h.0")
