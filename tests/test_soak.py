"""The soak, cut to one run on two processes that is killed once; the command runs as long as you like."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc to find processes")


def test_a_killed_and_resumed_run_ends_as_one_that_nothing_stopped(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks/soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    assert spec is not None
    assert spec.loader is not None
    soak_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak_module)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    soak = soak_module.Soak(tmp_path, ranks=2, seed=1)
    assert soak.round("modules", kills=1)
    assert sum(count for name, count in soak.counts.items() if name.startswith("killed")) == 1
    assert soak.counts["resumes"] >= 1
    whole = tmp_path / "modules-whole/h.1/sae.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1] + b"x")  # a comparison that can fail
    assert soak_module.contents(tmp_path / "modules-whole") != soak._whole["modules"]
