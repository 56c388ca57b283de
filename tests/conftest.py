"""Settings that must hold before anything imports Triton or Hugging Face libraries."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # what is printed depends on none of them
    os.environ.pop(name, None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)  # tiny products: more threads would mostly wait for each other, and for other workers'

import pytest  # noqa: E402


@pytest.fixture
def device() -> str:
    """Where kernels run in this test session: the GPU if there is one, else the interpreter's CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def two_threads():
    """Products and reductions are cut in two."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The report of a small run on the demo: (the run's folder, the HTML, the data inside it)."""
    import json
    import re

    from fastsae import RunConfig, SaeConfig, TrainConfig, Trainer, load_model
    from fastsae.data import load_tokens
    from fastsae.model import load_tokenizer
    from fastsae.report.run import report_run

    folder = tmp_path_factory.mktemp("runs")
    run = RunConfig(device="cpu", ctx_len=32, max_tokens=2560)
    model = load_model("demo", run)
    rows = load_tokens("stdlib", run, load_tokenizer("demo", run), model.config)
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4), hookpoints=("h.1", "h.2.mlp.act"), batch_size=8, save_dir=str(folder),
        run_name="a", log_every=2,
    )  # fmt: skip
    Trainer(cfg, rows, model, origin={"model": "demo", "dataset": "stdlib", **run.to_dict()}).fit(progress=False)
    options = {"per_coder": 10, "latents": ["3"], "device": "cpu"}
    html = report_run(str(folder / "a"), None, None, options, progress=False).read_text()
    return folder / "a", html, json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
