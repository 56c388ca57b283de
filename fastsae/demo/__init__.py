"""The embedded default: a small real language model and the text it was trained on.

The model (GPT-2 architecture, own byte-level BPE) was trained by ``python -m fastsae.demo.build`` on the
sources of the Python standard library, and its text is read from the Python that runs: so
``fastsae train`` works on a machine with no network, no GPU and no downloads, through exactly the
code that a Hugging Face hub model and dataset go through.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

NAME = "demo"
"""The name of the model on the command line."""

DATASET = "stdlib"
"""The name of its text on the command line."""

MODEL_DIR = Path(__file__).parent / "model"
"""A Hugging Face model folder: ``AutoModel.from_pretrained(MODEL_DIR)`` works."""

TRAINING = {"batch_size": 8, "ctx_len": 256, "max_tokens": 500_000}
"""What ``fastsae train`` sets for this model unless told otherwise: one to two and a half minutes on two cores."""

REPORTED_TOKENS = 32_768
"""Tokens that its report looks for contexts on: some ten seconds more."""

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def stdlib_sources() -> list[Path]:
    """The standard library's ``.py`` files that decode as UTF-8, without its tests, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts[:-1]) and _is_utf8(path)
    )
    if not files:
        raise FileNotFoundError(
            f"expected the Python standard library's sources under {root}, found none; "
            "name a model and a dataset: fastsae train MODEL DATASET"
        )
    return files


def is_held_out(path: Path) -> bool:
    """True for the one file in twenty that the demo model never saw (by a hash of the file's name)."""
    return zlib.crc32(path.name.encode()) % 20 == 0


def _is_utf8(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False
