"""Settings that must hold before anything imports Triton or Hugging Face libraries."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(2)

import pytest  # noqa: E402


@pytest.fixture
def device() -> str:
    """Where kernels run in this test session: the GPU if there is one, else the interpreter's CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
