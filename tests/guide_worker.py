"""What one rank of a torchrun command of docs/guide.md does."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastsae.cli import main as fastsae


def main(folder: Path, arguments: list[str]) -> None:
    """``fastsae ARGUMENTS`` in ``folder``."""
    torch.set_num_threads(1)
    os.chdir(folder)
    fastsae(arguments)
