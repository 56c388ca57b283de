"""Where coders lie: folders with ``cfg.json`` below a run's, or of a hub repository's snapshot."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from natsort import natsorted

from .errors import CheckpointError, first_line
from .integrity import check_name

CONFIG_FILE = "cfg.json"

NOT_CODERS = {"best", "steps", "state"}
"""Folders of a run that hold other things than its coders."""


def find_coders(root: Path | str, *, pattern: str | None = None) -> dict[str, Path]:
    """The coders below ``root`` by name (``h.0.mlp.act``, ``h.0/seed1``, ``h.0/k32/seed1``), in natural order.

    Folders without a ``cfg.json``, and the copies under ``best/`` and ``steps/``, are not coders. ``pattern`` is a
    wildcard on the whole name or on its hookpoint.
    """
    root = Path(root)
    found = {}
    for config in [path for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}/{CONFIG_FILE}")]:
        name = config.parent.relative_to(root).as_posix()
        hookpoint = name.partition("/")[0]
        if hookpoint not in NOT_CODERS and (
            pattern is None or fnmatchcase(name, pattern) or fnmatchcase(hookpoint, pattern)
        ):
            found[name] = config.parent
    return {name: found[name] for name in natsorted(found)}


def named_coder(root: Path, name: str) -> Path:
    """The folder of the coder called ``name``; the error lists those that exist."""
    check_name(name)
    if (root / name / CONFIG_FILE).is_file():
        return root / name
    names = list(find_coders(root))
    close = difflib.get_close_matches(name, names, n=3)
    listed = ", ".join(close or names[:8]) or "none"
    raise CheckpointError(f"no coder {name!r} in {root}; {'did you mean' if close else 'it holds'}: {listed}")


def download(repo: str, allow_patterns: str | None = None) -> Path:
    """A hub repository's snapshot (or the part that matches), as a folder of the local cache."""
    try:
        return Path(snapshot_download(repo, allow_patterns=allow_patterns))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"expected a Hugging Face hub repository, got {repo!r}: {first_line(error)} "
            "Check the name and the network; for a folder on disk use load_from_disk or load_many(..., local=True)"
        ) from None
