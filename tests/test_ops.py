"""Choosing an implementation: automatic ones say why, explicit ones never fall back."""

import logging

import pytest
import torch

from fastsae import ops
from fastsae.errors import ConfigError


def test_auto_says_its_reason_once(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_logged", set())
    with caplog.at_level(logging.INFO, logger="fastsae"):
        assert ops.resolve("auto", torch.device("cpu")) == "cpu"
        assert ops.resolve("auto", torch.device("cpu")) == "cpu"
    assert [record.message for record in caplog.records] == ["implementation: cpu (tensors are on the CPU)"]


def test_auto_by_device(monkeypatch):
    assert ops.resolve("auto", torch.device("mps")) == "reference"
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert ops.resolve("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert ops.resolve("auto", torch.device("cuda")) == "reference"


def test_explicit_choices_never_fall_back(monkeypatch):
    with pytest.raises(ConfigError, match="expects tensors on the CPU, got cuda"):
        ops.resolve("cpu", torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="expects tensors on a GPU, got cpu"):
        ops.resolve("triton", torch.device("cpu"))
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="pip install triton"):
        ops.resolve("triton", torch.device("cuda"))
    with pytest.raises(ConfigError, match="expected one of auto, triton, cpu, reference, got 'fast'"):
        ops.resolve("fast", torch.device("cpu"))
