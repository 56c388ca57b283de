"""The command line's options come from the configs and accept sparsify's habits."""

from itertools import pairwise

import pytest

from fastsae.arguments import normalise
from fastsae.coder_config import SaeConfig
from fastsae.config import TrainConfig
from fastsae.errors import ConfigError
from fastsae.options import build
from fastsae.run_config import RunConfig

CONFIGS = (SaeConfig, TrainConfig, RunConfig)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("train gpt2 --hookpoints a b", "train gpt2 --hookpoints a --hookpoints b"),
        ("train --hookpoints a,b --k 3", "train --hookpoints a,b --k 3"),
        ("train --expansion_factor 8", "train --expansion-factor 8"),
        ("train --expansion_factor=8", "train --expansion-factor=8"),
        ("train --layers 0 1 --transcode", "train --layers 0 --layers 1 --transcode on"),
        ("train --normalize_decoder False gpt2", "train --normalize-decoder off gpt2"),
        ("train --no-normalize-decoder", "train --normalize-decoder off"),
        ("train --run_name my_run", "train --run-name my_run"),
    ],
)
def test_normalise(given, read):
    assert normalise(given.split(), CONFIGS) == read.split()


@pytest.mark.parametrize(
    ("given", "values", "own"),
    [
        ("--hookpoints a gpt2", ["a"], ["gpt2"]),
        ("--hookpoints h.*.mlp h.0 gpt2 org/corpus", ["h.*.mlp", "h.0"], ["gpt2", "org/corpus"]),
        ("--hookpoints h.0 h.1 ./model ./tokens", ["h.0", "h.1"], ["./model", "./tokens"]),
        ("gpt2 --hookpoints h.0 wte org/corpus", ["h.0", "wte"], ["gpt2", "org/corpus"]),
        ("gpt2 --hookpoints h.0 wte here.jsonl", ["h.0", "wte"], ["gpt2", "here.jsonl"]),
        ("gpt2 stdlib --hookpoints h.0 wte mlp", ["h.0", "wte", "mlp"], ["gpt2", "stdlib"]),
        ("--k 3 --hookpoints h.0 gpt2", ["h.0"], ["gpt2"]),
        ("--hookpoints h.0 Llama-3.2", ["h.0"], ["Llama-3.2"]),
        ("--hookpoints h.0 h.1", ["h.0", "h.1"], []),
        ("--hookpoints wte -- gpt2", ["wte"], ["--", "gpt2"]),
        ("--layers 0 1 gpt2", ["0", "1"], ["gpt2"]),
        ("--exclude-tokens bos 5 eos,7 gpt2", ["bos", "5", "eos,7"], ["gpt2"]),
        ("gpt2 --layers 0 1 wikitext", ["0", "1"], ["gpt2", "wikitext"]),
    ],
)
def test_a_list_leaves_the_commands_own_arguments_alone(tmp_path, monkeypatch, given, values, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    for folder, file in (("Llama-3.2", "config.json"), ("h.1", "cfg.json")):  # a model; a coder of a run
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    read = normalise(["train", *given.split()], CONFIGS)
    name = next(part for part in read if part in ("--hookpoints", "--layers", "--exclude-tokens"))
    assert [value for option, value in pairwise(read) if option == name] == values
    taken = {i for i, option in enumerate(read) if option in (name, "--k")}
    assert [part for i, part in enumerate(read) if i not in taken and i - 1 not in taken] == ["train", *own]


def test_build_splits_lists_and_converts():
    cfg = build(TrainConfig, {"layers": ["0", "1,2"], "lr": 0.1, "not_mine": 3}, sae=build(SaeConfig, {"k": 5}))
    assert (cfg.layers, cfg.lr, cfg.sae.k) == ((0, 1, 2), 0.1, 5)
    assert build(SaeConfig, {"transcode": "on", "normalize_decoder": "False"}) == SaeConfig(
        transcode=True, normalize_decoder=False
    )


def test_bad_lists_and_switches():
    with pytest.raises(ConfigError, match="layers: expected integers, got 1, x"):
        build(TrainConfig, {"layers": ["1,x"]})
    with pytest.raises(ConfigError, match="transcode: expected on or off, got 'maybe'"):
        build(SaeConfig, {"transcode": "maybe"})
    with pytest.raises(ConfigError, match="k: expected an integer, got 'many'"):
        build(SaeConfig, {"k": "many"})
    with pytest.raises(ConfigError, match="lr: expected a number, got 'fast'"):
        build(TrainConfig, {"lr": "fast"})


def test_build_takes_values_and_text_alike():
    text = {"layers": ["0,1"], "lr": "1e-4", "batch_size": "8"}
    values = {"layers": [0, 1], "lr": 1e-4, "batch_size": 8}
    assert build(TrainConfig, text) == build(TrainConfig, values)
    assert build(TrainConfig, {"layers": 1}).layers == (1,)
    with pytest.raises(ConfigError, match="batch_size: expected an integer, got 8.5"):
        build(TrainConfig, {"batch_size": 8.5})
    with pytest.raises(ConfigError, match=r"hookpoints: expected a list of text, got \(3,\)"):
        build(TrainConfig, {"hookpoints": [3]})
