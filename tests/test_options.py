"""The command line's options come from the configs and accept sparsify's habits."""

import pytest

from fastsae.config import RunConfig, SaeConfig, TrainConfig
from fastsae.errors import ConfigError
from fastsae.options import build, normalise

CONFIGS = (SaeConfig, TrainConfig, RunConfig)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["gpt2", "--hookpoints", "a", "b"], ["gpt2", "--hookpoints", "a", "--hookpoints", "b"]),
        (["--hookpoints", "a,b", "--k", "3"], ["--hookpoints", "a,b", "--k", "3"]),
        (["--expansion_factor", "8"], ["--expansion-factor", "8"]),
        (["--expansion_factor=8"], ["--expansion-factor=8"]),
        (["--layers", "0", "1", "--transcode"], ["--layers", "0", "--layers", "1", "--transcode", "on"]),
        (["--normalize_decoder", "False", "gpt2"], ["--normalize-decoder", "off", "gpt2"]),
        (["--no-normalize-decoder"], ["--normalize-decoder", "off"]),
        (["--run_name", "my_run"], ["--run-name", "my_run"]),
    ],
)
def test_normalise(given, read):
    assert normalise(given, CONFIGS) == read


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
