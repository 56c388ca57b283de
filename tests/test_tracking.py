"""Where metrics go: a JSONL file always, trackers only when asked for, and never the access token."""

import json
import sys
import types

import pytest

from fastsae.errors import ConfigError
from fastsae.tracking import Tracker, check_trackers


def test_jsonl_only_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = Tracker(tmp_path, (), {})
    tracker.log(1, {"fvu": 0.5})
    tracker.log(2, {"fvu": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # readable while the run goes on
    tracker.close()
    assert [json.loads(line) for line in lines] == [{"step": 1, "fvu": 0.5}, {"step": 2, "fvu": 0.25}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_gets_config_and_values(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    module = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    (folder := tmp_path / "my-run").mkdir()
    tracker = Tracker(folder, ("wandb",), {"k": 3})
    tracker.log(4, {"fvu": 0.5})
    tracker.close()
    assert calls == [{"project": "fastsae", "name": "my-run", "config": {"k": 3}}, (4, {"fvu": 0.5}), "finish"]


def test_missing_trackers_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="expected the package 'wandb'.*pip install wandb"):
        Tracker(tmp_path, ("wandb",), {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Tracker(tmp_path, ("tensorboard",), {})


def test_missing_trackers_are_found_before_any_work(monkeypatch):
    check_trackers(())
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=f"log_to: expected the package '{name}'.*pip install {name}"):
            check_trackers((name,))
