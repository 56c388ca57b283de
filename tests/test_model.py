"""Loading models and tokenizers: precision, attention, 8 bits, encoders alone, and folders that lack something."""

import importlib.util

import pytest
import torch
from models import make_model, save_model
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from fastsae import RunConfig, devices, load_model, load_tokenizer
from fastsae.errors import ArtifactError, ConfigError
from fastsae.hookpoints import layer_hookpoints, probe


def t5(model_class):
    torch.manual_seed(0)
    return model_class(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_precision_is_the_one_asked_for(tmp_path, dtype, expected):
    model = load_model(str(save_model("gpt2", tmp_path)), RunConfig(dtype=dtype, device="cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert (model.training, any(p.requires_grad for p in model.parameters())) == (False, False)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_code_is_the_one_asked_for(tmp_path, name):
    model = load_model(str(save_model("llama", tmp_path)), RunConfig(attn_implementation=name, device="cpu"))
    assert model.config._attn_implementation == name


def test_attention_code_that_there_is_not(tmp_path):
    with pytest.raises(ConfigError, match="attn_implementation: expected one that this model has, got 'fastest'"):
        load_model(str(save_model("llama", tmp_path)), RunConfig(attn_implementation="fastest", device="cpu"))


def test_8_bits_need_a_gpu():
    with pytest.raises(ConfigError, match="load_in_8bit: expected a GPU to load the model on, got cpu"):
        load_model("demo", RunConfig(load_in_8bit=True, device="cpu"))


def test_8_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr(devices, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(devices, "resolve_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ConfigError, match=r"expected the package 'bitsandbytes'.*pip install 'fastsae\[8bit\]'"):
        load_model("demo", RunConfig(load_in_8bit=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="8 bits need a GPU")
def test_8_bits():
    pytest.importorskip("bitsandbytes")
    model = load_model("demo", RunConfig(load_in_8bit=True))
    assert torch.int8 in {parameter.dtype for parameter in model.parameters()}
    assert probe(model, ["h.1"])["h.1"].d_out == 128


def test_an_encoder_alone_is_loaded_as_such(tmp_path):
    t5(T5EncoderModel).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), RunConfig(device="cpu"))
    assert isinstance(model, T5EncoderModel)
    names = layer_hookpoints(model)
    assert names == ["encoder.block.0", "encoder.block.1"]
    assert [at.d_out for at in probe(model, names).values()] == [16, 16]


def test_encoder_decoders_are_refused_with_the_way_out(tmp_path):
    t5(T5ForConditionalGeneration).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="got T5Model, an encoder-decoder; save its encoder alone"):
        load_model(str(tmp_path), RunConfig(device="cpu"))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "t5"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, architecture):
    model = t5(T5EncoderModel) if architecture == "t5" else make_model(architecture)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="tokenizer: expected one beside the model.* holds none; save it there"):
        load_tokenizer(str(tmp_path), RunConfig())


def test_a_tokenizer_is_found(tmp_path):
    assert len(load_tokenizer(str(save_model("gpt2", tmp_path)), RunConfig())) == 4096


def test_a_folder_of_a_similar_name_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    for name in ("./my-modle", "my-modle"):
        with pytest.raises(ArtifactError, match=r"got '(./)?my-modle'.*; did you mean my-model\?"):
            load_model(name, RunConfig(device="cpu"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ArtifactError, match="model: expected a Hugging Face hub id or a folder saved by"):
        load_model(str(tmp_path), RunConfig(device="cpu"))


def test_the_default_device_has_kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve_device(None) == torch.device("cpu")  # and not Metal, which fastsae knows no kernels for
    assert devices.resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve_device(None) == torch.device("cuda")
