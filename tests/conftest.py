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


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN, or the least integer: an output that a kernel forgets to write cannot pass."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool:
                return out
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
