"""The real libraries read what we write, and we read what they write; the same is computed, to 1e-6 in float32."""

import json

import pytest
import torch
from coders import D, K, L, assert_computes, inputs, make_coder, truth

from fastsae.compat import convert

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries
PEERS = "not installed; pip install torch==2.14.1 torchvision==0.29.1, then 'fastsae[peers]'"


def close(got, wanted, tolerance=1e-6):
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got.double(), wanted, atol=tolerance * scale, rtol=tolerance)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
                if "threshold" in name:
                    tensor.abs_()


# ---- SAELens ----


@pytest.fixture
def sae_lens():
    return pytest.importorskip("sae_lens", reason=f"sae-lens: {PEERS}")


SAELENS = [
    {}, {"activation": "jumprelu"}, {"activation": "relu"}, {"centered": False}, {"layer_norm": True},
    {"activation": "relu", "transcode": True, "d_out": 24}, {"activation": "relu", "transcode": True, "skip": True},
    {"activation": "jumprelu", "transcode": True, "d_out": 24, "skip": True},
    {"activation": "jumprelu", "transcode": True},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("facts", SAELENS, ids=str)
def test_saelens_reads_ours(tmp_path, sae_lens, facts, dtype):
    coder = make_coder(**facts, dtype=dtype)
    convert.save({"": coder}, tmp_path / "out", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out", dtype="float32")  # 16-bit weights, exactly widened
    acts, out = truth(coder, inputs())
    close(theirs.encode(inputs()), acts)
    close(theirs(inputs()), out)
    assert sae_lens.SAE.load_from_disk(tmp_path / "out").dtype == dtype
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_mlp_out"
    assert theirs.cfg.metadata.hf_hook_name == "h.3.mlp"
    assert theirs.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": False}


@pytest.mark.parametrize(
    "name",
    ["Standard", "TopK", "JumpReLU", "Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"],
)
def test_we_read_saelens(tmp_path, sae_lens, name):
    suffix, options = ("", {"d_out": 24, "apply_b_dec_to_input": False}) if "Transcoder" in name else ("SAE", {})
    options |= {"k": K} if name == "TopK" else {}
    theirs = getattr(sae_lens, name + suffix)(getattr(sae_lens, f"{name}{suffix}Config")(D, L, **options))
    randomise(theirs)
    theirs.save_model(tmp_path / "theirs")
    ours = convert.load(tmp_path / "theirs")
    assert_computes(ours, theirs.encode(inputs()).double(), theirs(inputs()).double(), inputs())


@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "MatryoshkaBatchTopK"])
def test_we_read_saelens_training_folders(tmp_path, sae_lens, name):
    options = {"matryoshka_widths": [16, L]} if name.startswith("Matryoshka") else {}
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(D, L, k=K, **options)
    )
    randomise(theirs)
    if "topk_threshold" in dict(theirs.named_buffers()):
        theirs.topk_threshold.fill_(0.2)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    acts, out = inference.encode(inputs()).double(), inference(inputs()).double()
    assert 0 < (acts > 0).double().mean() < 0.9
    for folder in ("training", "inference"):
        ours = convert.load(tmp_path / folder)
        assert ours.k == (K if folder == "training" or name == "TopK" else None)
        assert_computes(ours, acts, out, inputs(), 2e-6)


# ---- dictionary_learning ----


@pytest.fixture
def dictionary_learning():
    pytest.importorskip("dictionary_learning", reason=f"dictionary-learning: {PEERS}")
    from dictionary_learning import utils

    return utils


@pytest.mark.parametrize(
    "facts",
    [
        {}, {"centered": False}, {"activation": "relu"}, {"activation": "jumprelu", "centered": False},
        {"activation": "jumprelu"},
    ],
    ids=str,
)  # fmt: skip
def test_dictionary_learning_reads_ours(tmp_path, dictionary_learning, facts):
    coder = make_coder(**facts)
    convert.save({"": coder}, tmp_path / "out", "dictionary_learning")
    theirs, config = dictionary_learning.load_dictionary(str(tmp_path / "out"), device="cpu")
    acts, out = truth(coder, inputs())
    got = theirs(inputs(), output_features=True)
    close(got[1], acts)
    close(got[0], out)
    assert (theirs.activation_dim, theirs.dict_size) == (D, L)
    assert {name: config["trainer"][name] for name in ("layer", "lm_name", "submodule_name")} == {
        "layer": 3, "lm_name": "gpt2", "submodule_name": "h.3.mlp"
    }  # fmt: skip


def test_dictionary_learning_reads_a_shared_threshold(tmp_path, dictionary_learning):
    coder = make_coder("jumprelu", k=K).replace(threshold=torch.full((L,), 0.3))
    convert.save({"": coder}, tmp_path / "out", "dictionary_learning")
    theirs, config = dictionary_learning.load_dictionary(str(tmp_path / "out"), device="cpu")
    assert (type(theirs).__name__, config["trainer"]["k"]) == ("BatchTopKSAE", K)
    close(theirs.encode(inputs()), truth(coder, inputs())[0])


CLASSES = {
    "AutoEncoderTopK": (D, L, K), "BatchTopKSAE": (D, L, K), "MatryoshkaBatchTopKSAE": (D, L, K, [16, L - 16]),
    "JumpReluAutoEncoder": (D, L), "AutoEncoder": (D, L), "AutoEncoderNew": (D, L),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("threshold", [-1.0, 0.3])
def test_we_read_dictionary_learning(tmp_path, dictionary_learning, name, threshold):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    homes = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
    theirs = next(getattr(home, name) for home in homes if hasattr(home, name))(*CLASSES[name])
    randomise(theirs)
    if "threshold" in dict(theirs.named_buffers()):
        theirs.threshold.fill_(threshold)  # type: ignore[operator]
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": name, "submodule_name": "resid_post_layer_5"}})
    )
    ours = convert.load(tmp_path)
    assert ours.hook_name == "blocks.5.hook_resid_post"
    x = inputs().flatten(0, 1)  # its matryoshka class takes two dimensions only
    assert_computes(ours, theirs.encode(x).double(), theirs(x).double(), x)


# ---- circuit-tracer ----


@pytest.mark.parametrize(
    "facts", [{}, {"skip": True}, {"activation": "jumprelu", "skip": True}, {"activation": "relu"}], ids=str
)
def test_circuit_tracer_reads_ours(tmp_path, facts):
    module = pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder", reason="pip install --no-deps circuit-tracer==0.5.0"
    )
    from circuit_tracer.transcoder.activation_functions import TopK

    coders = {f"h.{i}.mlp": make_coder(transcode=True, hookpoint=f"h.{i}.mlp", **facts) for i in range(2)}
    convert.save(coders, tmp_path / "set", "circuit_tracer")
    paths = {i: str(tmp_path / f"set/layer_{i}.safetensors") for i in range(2)}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    theirs = module.load_transcoder_set(paths, "scan", **hooks, device=torch.device("cpu"))
    for coder, layer in zip(coders.values(), theirs, strict=True):
        if coder.activation == "topk":  # config.yaml says so; this release does not look there yet
            layer.activation_function = TopK(K)
        acts, out = truth(coder, inputs())
        close(layer.encode(inputs()).relu(), acts)
        close(layer.decode(acts.float(), inputs()), out)


def test_we_read_circuit_tracer(tmp_path):
    module = pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder", reason="pip install --no-deps circuit-tracer==0.5.0"
    )
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    theirs = module.SingleLayerTranscoder(
        D, L, JumpReLU(torch.rand(L) / 4), 0, skip_connection=True, device=torch.device("cpu"), dtype=torch.float32
    )
    randomise(theirs)
    theirs.to_safetensors(str(tmp_path / "layer_0.safetensors"))
    ours = convert.load(tmp_path / "layer_0.safetensors")
    assert (ours.activation, ours.transcode, ours.hook_name) == ("jumprelu", True, "blocks.0.hook_mlp_out")
    assert_computes(ours, theirs.encode(inputs()).double(), theirs(inputs()).double(), inputs())
