"""The kernels as a hub repository: staged, loaded under another name, and by the hub's own loader."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fastsae_kernels
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "kernels/stage.py"
LOAD = """
import importlib.util, sys
import torch
sys.modules["fastsae_kernels"] = None  # an absolute import of itself would fail here
torch.manual_seed(0)
x, W, b, D = torch.randn(9, 16), torch.randn(64, 16), torch.randn(64), torch.randn(64, 16)
for name, path in zip(["first", "second"], sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py", submodule_search_locations=[path])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert all(getattr(module, public) is not None for public in module.__all__)
    acts, indices, _ = module.topk_encode(x, W, b, 5, implementation="cpu")
    out = module.sparse_decode(acts, indices, D, implementation="cpu")
    print(torch.equal(indices, (x @ W.T + b).relu().topk(5).indices))
    print(torch.allclose(out, torch.zeros(9, 64).scatter(1, indices, acts) @ D, atol=1e-4))
print([hasattr(getattr(torch.ops, name), "encode") for name in ("first", "second_flat")])
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fastsae-kernels"
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(folder / f"build/torch-{backend}") for backend in ("cuda", "rocm", "cpu")]
    return folder


def test_layout_and_digests(staged):
    assert (staged / "README.md").is_file()
    for variant in (staged / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        assert metadata["id"].isidentifier()
        files = metadata["digest"]["files"]
        assert set(files) == {path.relative_to(variant).as_posix() for path in variant.rglob("*.py*") if path.is_file()}
        for name, digest in files.items():
            assert base64.b64encode(hashlib.sha256((variant / name).read_bytes()).digest()).decode() == digest
        assert not list(variant.rglob("__pycache__"))


def test_it_works_under_another_name(staged):
    """Two copies in one process, each with operators of its own: by the flat layout and by the older one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    copies = [str(staged / path) for path in ("build/torch-cpu", "build/torch-cpu/fastsae_kernels")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *copies],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=staged.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:5] == ["True", "True", "True", "True", "[True, True]"]


def test_a_folder_with_files_is_left_alone(staged):
    done = subprocess.run([sys.executable, str(SCRIPT), str(staged)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected a new or empty folder" in done.stderr


@pytest.mark.filterwarnings("ignore")  # of the loader
def test_the_hubs_own_loader_takes_it(staged):
    loader = pytest.importorskip("kernels", reason="kernels: pip install 'fastsae[peers]'")
    if not hasattr(loader, "get_local_kernel"):
        pytest.skip("the folder kernels/ of this repository, not Hugging Face's package; pip install 'fastsae[peers]'")
    module = loader.get_local_kernel(staged, backend="cpu")
    assert module.__name__ != "fastsae_kernels"
    assert module.__all__ == fastsae_kernels.__all__
    x, W, b = torch.randn(9, 16), torch.randn(64, 16), torch.randn(64)
    mine = fastsae_kernels.topk_encode(x, W, b, 5, implementation="cpu")
    other = module.topk_encode(x, W, b, 5, implementation="cpu")
    assert torch.equal(mine.top_acts, other.top_acts)
    assert torch.equal(mine.top_indices, other.top_indices)
