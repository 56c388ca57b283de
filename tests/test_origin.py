"""Where a coder was trained, and what does not fit elsewhere."""

import pytest

from fastsae import demo
from fastsae.origin import Origin, misfits, same_model

HERE = Origin("org/gpt2", "main", "h.0", 768, 3.0, 40.0)


def test_notes_round_trip_and_strangers_types_are_unknown():
    assert Origin.from_notes({**HERE.to_notes(), "step": 3}) == HERE
    assert Origin.from_notes({"model": 3, "width": "768", "activation_norm": None, "hookpoint": "h.0"}) == Origin(
        hookpoint="h.0"
    )
    assert Origin(width=3).to_notes() == {"width": 3}


def test_what_fits_or_is_unknown():
    assert misfits(HERE, HERE) == []
    assert misfits(Origin(), HERE) == misfits(HERE, Origin()) == []
    assert misfits(HERE, Origin("gpt2", None, "h.0", 768, 12.9, 59.9)) == []


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"hookpoint": "h.1"}, ["expected a coder of this hookpoint (h.0), got one trained on h.1"]),
        ({"model": "org/gpt2-xl"}, ["expected a coder of org/gpt2, got one trained on org/gpt2-xl"]),
        ({"revision": "v2"}, ["expected a coder of revision main, got one trained on v2"]),
        ({"width": 512}, ["expected a coder of width 768, got one of width 512"]),
        (
            {"activation_norm": 8.0, "activation_mean": 3.5},
            ["expected activations of mean norm 8, as in training, got 40 (5 times)"],
        ),
        (
            {"activation_mean": 25.0},
            ["expected activations whose mean has norm 25, as in training, got 3"],
        ),
        (
            {"hookpoint": "h.1", "width": 512},
            [
                "expected a coder of this hookpoint (h.0), got one trained on h.1",
                "expected a coder of width 768, got one of width 512",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(there, expected):
    trained = Origin(**{**HERE.to_notes(), **there})
    assert misfits(trained, HERE) == expected


def test_the_same_model_under_two_names(tmp_path):
    assert same_model("demo", str(demo.MODEL_DIR))
    assert same_model("openai-community/gpt2", "gpt2")
    assert not same_model("gpt2", "gpt2-xl")
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    assert not same_model(str(tmp_path / "a/model"), str(tmp_path / "b/model"))
    assert same_model(str(tmp_path / "a/model"), str(tmp_path / "b/../a/model"))
