"""Configs: checked at birth, with errors that name the field, what came, and the way out."""

import dataclasses

import pytest

from fastsae.coder_config import SaeConfig, TranscoderConfig
from fastsae.config import TrainConfig
from fastsae.errors import ConfigError
from fastsae.fields import field_docs
from fastsae.run_config import RunConfig


@pytest.mark.parametrize("config", [SaeConfig, TrainConfig, RunConfig])
def test_every_field_has_a_sentence(config):
    docs = field_docs(config)
    assert set(docs) == {field.name for field in dataclasses.fields(config)}
    assert all(text.endswith(".") for text in docs.values())


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SaeConfig().k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SaeConfig(k=0), "k: expected at least 1, got 0"),
        (lambda: SaeConfig(k="32"), "k: expected an integer, got '32'"),  # type: ignore[arg-type]
        (lambda: SaeConfig(k=True), "k: expected an integer, got True"),
        (lambda: SaeConfig(activation="relu"), "activation: expected 'topk' or 'groupmax' or 'batchtopk', got 'relu'"),  # type: ignore[arg-type]
        (lambda: SaeConfig(num_latents=16, k=17), "got k = 17 and 16 latents; lower --k"),
        (lambda: SaeConfig(num_latents=16, k=5, multi_topk=True), r"got 4k \(Multi-TopK\) = 20 and 16 latents"),
        (lambda: SaeConfig(num_latents=100, k=33, activation="groupmax"), "divisible by k.*try --k 25"),
        (lambda: TrainConfig(lr=-1.0), "lr: expected a positive number, got -1.0"),
        (lambda: TrainConfig(lr=float("nan")), "lr: expected a number or nothing, got nan"),
        (lambda: TrainConfig(layers=(1,), hookpoints=("h.0",)), "expected layers or hookpoints, got both"),
        (lambda: TrainConfig(layers=(1,), layer_stride=2), "expected layers or layer_stride, got both"),
        (lambda: TrainConfig(init_seeds=(1, 1)), "init_seeds: expected distinct seeds"),
        (lambda: TrainConfig(log_to=("mlflow",)), "log_to: expected a list of 'wandb' or 'tensorboard'"),  # type: ignore[arg-type]
        (lambda: RunConfig(ctx_len=0), "ctx_len: expected at least 1, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_latents_follow_width_unless_given():
    assert SaeConfig(expansion_factor=4).latents_for(12) == 48
    assert SaeConfig(num_latents=40).latents_for(12) == 40
    with pytest.raises(ConfigError, match="got k = 32 and 24 latents"):
        SaeConfig(expansion_factor=2).latents_for(12)


def test_dict_round_trip_and_foreign_keys():
    cfg = TranscoderConfig(k=7, num_latents=64)
    assert cfg.transcode
    assert SaeConfig.from_dict({**cfg.to_dict(), "d_in": 9, "from_the_future": 1}) == cfg
    assert SaeConfig.from_dict({}) == SaeConfig()


def test_lists_become_tuples():
    assert TrainConfig(hookpoints=["a", "b"]).hookpoints == ("a", "b")  # type: ignore[arg-type]


def test_the_token_is_not_in_what_is_stored_or_printed():
    run = RunConfig(hf_token="hf_secret")
    assert "hf_secret" not in repr(run)
    assert "hf_secret" not in str(run.to_dict())


@pytest.mark.parametrize(
    ("changes", "sae", "message"),
    [
        ({"distribute_modules": True}, {}, "got both"),
        ({"optimizer": "bnb_adam8bit"}, {}, "use adam8bit"),
        ({}, {"activation": "groupmax", "multi_topk": True}, "drop --multi-topk"),
        ({"distribute_latents": 0}, {}, "at least 1"),
    ],
)
def test_what_cannot_be_split_by_latent_is_refused(changes, sae, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(SaeConfig(**sae), **{"distribute_latents": 2, **changes})
