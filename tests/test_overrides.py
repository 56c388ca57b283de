"""Coders that differ by hookpoint, and several at one."""

import pytest

from fastsae.coder_config import SaeConfig
from fastsae.errors import ConfigError, HookpointError
from fastsae.overrides import Override, coder_name, parse_override, resolve_variants

NAMES = ["h.0", "h.1", "h.1.mlp", "h.10"]


def resolve(*texts, base=SaeConfig(k=8)):  # noqa: B008
    return resolve_variants(base, map(parse_override, texts), NAMES)


def test_parsing():
    assert parse_override("h.[0-3].*:k=64,expansion_factor=16") == Override(
        "h.[0-3].*", (("k", (64,)), ("expansion_factor", (16,)))
    )
    assert parse_override(" h.0 : multi-topk=on, k = 3|5 ") == Override("h.0", (("multi_topk", (True,)), ("k", (3, 5))))


def test_without_overrides_every_hookpoint_has_the_base():
    assert resolve() == {name: {"": SaeConfig(k=8)} for name in NAMES}


def test_a_pattern_changes_the_hookpoints_it_matches():
    assert resolve("h.?:k=64,activation=groupmax") == {
        "h.0": {"": SaeConfig(k=64, activation="groupmax")}, "h.1": {"": SaeConfig(k=64, activation="groupmax")},
        "h.1.mlp": {"": SaeConfig(k=8)}, "h.10": {"": SaeConfig(k=8)},
    }  # fmt: skip


def test_later_ones_win_field_by_field():
    found = resolve("*:k=64,expansion_factor=16", "h.1*:k=4")
    assert found["h.0"] == {"": SaeConfig(k=64, expansion_factor=16)}
    assert found["h.10"] == {"": SaeConfig(k=4, expansion_factor=16)}


def test_several_values_make_variants():
    found = resolve("h.0:k=32|64", "h.1:k=4|8,num_latents=100|200,normalize_decoder=off")
    assert found["h.0"] == {"k32": SaeConfig(k=32), "k64": SaeConfig(k=64)}
    assert list(found["h.1"]) == ["k4-num_latents100", "k4-num_latents200", "k8-num_latents100", "k8-num_latents200"]
    assert found["h.1"]["k8-num_latents100"] == SaeConfig(k=8, num_latents=100, normalize_decoder=False)
    assert found["h.10"] == {"": SaeConfig(k=8)}


def test_an_expansion_factor_wins_over_a_number_of_latents_for_all():
    found = resolve("h.0:expansion_factor=4", base=SaeConfig(num_latents=512, k=8))
    assert found["h.0"][""].latents_for(16) == 64
    assert found["h.1"][""].latents_for(16) == 512


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k=64", "expected PATTERN:field=value,..., got 'k=64'"),
        (":k=64", "expected PATTERN:field=value"),
        ("h.0:", "expected PATTERN:field=value"),
        ("h.0:kay=3", "expected a field of a coder, got 'kay'"),
        ("h.0:expansion_facto=3", "got 'expansion_facto' .*; did you mean expansion_factor"),
        ("h.0:k", "expected k=value, got 'k'"),
        ("h.0:k=many", "k: expected an integer, got 'many'"),
        ("h.0:multi_topk=maybe", "multi_topk: expected on or off"),
        ("h.0:activation=relu", "activation: expected 'topk' or 'groupmax' or 'batchtopk', got 'relu'"),
        ("h.0:k=3|3", r"expected distinct values of k, got '3\|3'"),
        ("h.0:k=3,k=4", "expected k once in 'h.0:k=3,k=4'; several values go together"),
        ("h.0:transcode=on", "transcode is the same for all coders of a run"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_override(text)


def test_what_cannot_be_resolved():
    with pytest.raises(HookpointError, match="no hookpoint of this run matches 'layers.*'; it trains on h.0, h.1"):
        resolve("layers.*:k=3")
    with pytest.raises(ConfigError, match="set: h.0: expected k <= number of latents, got k = 8 and 4 latents"):
        resolve("h.0:num_latents=4")


def test_names_are_folders_below_the_hookpoints():
    assert coder_name("h.0") == "h.0"
    assert coder_name("h.0", seed=1) == "h.0/seed1"
    assert coder_name("h.0", "k32") == "h.0/k32"
    assert coder_name("h.0", "k32", 1) == "h.0/k32/seed1"
