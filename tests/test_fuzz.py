"""Any configuration: what is accepted trains two steps with finite losses, what is refused says why in one line."""

import math

import pytest
from models import make_model, token_rows

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae.coder_config import SaeConfig
from fastsae.config import TrainConfig
from fastsae.errors import ConfigError, FastsaeError
from fastsae.options import build
from fastsae.run_config import RunConfig
from fastsae.sae import FastSae
from fastsae.trainer import Trainer

coders = st.fixed_dictionaries(
    {},
    optional={
        "activation": st.sampled_from(["topk", "topk", "groupmax", "batchtopk", "relu"]),
        "expansion_factor": st.sampled_from([2, 3, 4, 0]),
        "num_latents": st.sampled_from([0, 64, 100, 1]),
        "k": st.sampled_from([1, 4, 5, 8, 40, 0]),
        "normalize_decoder": st.booleans(),
        "multi_topk": st.booleans(),
        "matryoshka_widths": st.sampled_from([[], "8,32", [16], [64], [0], [5, 3], [200]]),
        "skip_connection": st.booleans(),
        "transcode": st.booleans(),
    },
)
runs = st.fixed_dictionaries(
    {"hookpoints": st.sampled_from([["h.0.mlp"], ["h.*"], ["h.1", "h.1.mlp.act"], "h.2", ["h.9"]])},
    optional={
        "batch_size": st.sampled_from([1, 3, 5, 0]),
        "grad_acc_steps": st.sampled_from([1, 2, 1, 0]),
        "micro_acc_steps": st.sampled_from([1, 2, 3, 0]),
        "optimizer": st.sampled_from(["adam", "signum", "muon", "sgd"]),
        "loss_fn": st.sampled_from(["fvu", "fvu", "kl", "ce", "mse"]),
        "token_buffer": st.sampled_from([0, 20, -1]),
        "max_grad_norm": st.sampled_from([None, 1.0, 0.0]),
        "set": st.sampled_from([[], ["h.1*:k=2|3"], ["h.*:num_latents=40,k=2"], ["h.0*:k=0"], ["h.7:k=2"], ["k=2"]]),
        "finetune": st.sampled_from([None, None, "SAVED", "nowhere/at/all"]),
        "lr": st.sampled_from([1e-3, 1e-2, "1e-3", None, 0.0, math.nan]),
        "auxk_alpha": st.sampled_from([0.0, 1 / 32, 1, -1.0]),
        "dead_feature_threshold": st.sampled_from([0, 10]),
        "exclude_tokens": st.sampled_from([[], [5, 6], "7", ["x"]]),
        "init_seeds": st.sampled_from([[0], [0, 1], [3], [1, 1]]),
        "implementation": st.sampled_from(["auto", "cpu", "reference", "auto", "gpu"]),
        "layer_stride": st.sampled_from([1, 2, 1, 0]),
    },
)


def outcome(coder, run, folder) -> Trainer | str:
    """A trainer, or why there is none."""
    if run.get("finetune") == "SAVED":
        run = {**run, "finetune": f"{folder}/saved"}
    try:
        cfg = build(TrainConfig, {**run, "save_dir": folder, "held_out": 0}, sae=build(SaeConfig, coder))
        return Trainer(cfg, token_rows(10, 6), make_model("gpt2"))
    except FastsaeError as error:
        return str(error)


def test_what_is_accepted_trains_and_what_is_refused_says_why(tmp_path):
    rows, accepted, refused = token_rows(10, 6), [], set()
    for name in ("h.0.mlp", "h.1"):
        FastSae(32, SaeConfig(num_latents=64, k=4)).save_to_disk(tmp_path / "saved" / name)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(coders, runs)
    def any_config(coder, run):
        trainer = outcome(coder, run, str(tmp_path))
        if isinstance(trainer, str):
            assert "\n" not in trainer
            assert "expected" in trainer or "no module" in trainer
            refused.add(trainer.partition(",")[0])
            return
        for start in (0, 5):
            trainer.train_step([{"input_ids": rows[start : start + 5]["input_ids"]}])
        values = trainer.read_metrics()
        assert trainer.tokens > 0
        assert all(math.isfinite(value) for value in values.values()), values
        accepted.append(trainer.cfg)

    any_config()
    assert len(accepted) >= 5
    assert len(refused) >= 4


OPTION_TEXT = st.one_of(st.text(max_size=8), st.integers().map(str), st.sampled_from(["on", "false", "auto", "1e-3"]))


def read(config, name, value):
    """(what the field holds, why it is refused)."""
    try:
        return getattr(build(config, {name: value}), name), None
    except ConfigError as error:
        return None, str(error)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([SaeConfig, TrainConfig, RunConfig]), st.data())
def test_any_text_for_any_option_is_read_or_refused_by_name(config, data):
    name = data.draw(st.sampled_from([name for name in config.__dataclass_fields__ if name != "sae"]))
    value, refusal = read(config, name, data.draw(OPTION_TEXT))
    if refusal is None:
        assert read(config, name, value) == (value, None)  # what a field holds is read as itself
    else:
        assert name in refusal or "latents" in refusal
