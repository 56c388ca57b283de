"""Which saved coder a run's coders go on from."""

import pytest

from fastsae.errors import CheckpointError
from fastsae.finetune import match_coders


@pytest.mark.parametrize(
    ("wanted", "available", "expected"),
    [
        (["h.0", "h.1"], ["h.0", "h.1", "h.2"], {"h.0": "h.0", "h.1": "h.1"}),
        (["h.0/seed0", "h.0/seed1"], ["h.0/seed0", "h.0/seed1"], {"h.0/seed0": "h.0/seed0", "h.0/seed1": "h.0/seed1"}),
        (["h.0/seed0", "h.0/seed1"], ["h.0"], {"h.0/seed0": "h.0", "h.0/seed1": "h.0"}),
        (["h.0"], ["h.0/seed3", "h.1"], {"h.0": "h.0/seed3"}),
        (["h.0/k32"], ["h.0/k8", "h.0"], {"h.0/k32": "h.0"}),
        (["h.0/seed0", "h.0/seed1"], [""], {"h.0/seed0": "", "h.0/seed1": ""}),
    ],
)
def test_by_name_else_by_hookpoint(wanted, available, expected):
    assert match_coders(wanted, available) == expected


@pytest.mark.parametrize(
    ("wanted", "available", "message"),
    [
        (["h.0", "h.3"], ["h.0", "h.1"], "expected a saved coder for h.3, found h.0, h.1"),
        (["h.0"], ["h.0/seed0", "h.0/seed1"], "for h.0, found h.0/seed0, h.0/seed1"),
        (["h.0"], [], "for h.0, found none"),
        (["h.0", "h.1"], [""], "for h.0, found"),
    ],
)
def test_what_is_missing(wanted, available, message):
    with pytest.raises(CheckpointError, match=message):
        match_coders(wanted, available)
