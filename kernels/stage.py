"""Lay ``fastsae_kernels`` out as a Hugging Face kernel repository: ``python kernels/stage.py FOLDER``.

    FOLDER/README.md
    FOLDER/build/torch-{cuda,rocm,cpu}/          the package itself, metadata.json with a digest of every file
    FOLDER/build/torch-.../fastsae_kernels/      the same names again, for loaders before the flat layout

A copy is enough, because the package imports itself only relatively and registers its operators under whatever name it
is loaded by. Upload it with the hub's client: ``hf upload ORG/fastsae-kernels FOLDER --repo-type kernel``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "fastsae_kernels"
BACKENDS = {
    "cuda": {"type": "cuda", "archs": ["8.0", "8.6", "8.9", "9.0", "10.0"]},
    "rocm": {"type": "rocm", "archs": ["gfx942"]},
    "cpu": {"type": "cpu"},
}
"""What the kernels are compiled for in tests; Triton compiles on the user's machine, for these and others."""

OLD_LOADERS = '''"""The package one folder up, under its own name: where loaders before the flat layout look."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_name = f"{__name__}_flat"
_spec = importlib.util.spec_from_file_location(_name, _path, submodule_search_locations=[str(_path.parent)])
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({name: getattr(_module, name) for name in __all__})
'''


def stage(folder: Path) -> list[Path]:
    """Write the repository into a new folder; returns its build variants."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"expected a new or empty folder, got {folder}")
    variants = []
    for backend, facts in BACKENDS.items():
        variant = folder / f"build/torch-{backend}"
        shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
        (variant / PACKAGE.name).mkdir()
        (variant / PACKAGE.name / "__init__.py").write_text(OLD_LOADERS)
        files = {path.relative_to(variant).as_posix(): path.read_bytes() for path in sorted(variant.rglob("*.py*"))}
        digest = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
        whole = hashlib.sha256(json.dumps(digest).encode()).hexdigest()
        metadata = {
            "id": f"_fastsae_kernels_{backend}_{whole[:7]}",
            "name": "fastsae-kernels",
            "version": 0,  # 0: the interface may still change
            "license": "MIT",
            "python-depends": [],
            "backend": facts,
            "digest": {"algorithm": "sha256", "files": digest},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    shutil.copy(PACKAGE.parent / "README.md", folder / "README.md")
    return variants


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python kernels/stage.py FOLDER")
    for path in stage(Path(sys.argv[1])):
        print(path)
