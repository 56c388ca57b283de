"""Names on the Hugging Face hub: whether there is such a repository, found out by one request.

transformers and datasets ask again and again, for a minute or more, where a name is misspelt or the network is
away; a name that is no repository is refused here at once.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from .errors import ArtifactError, first_line

SECONDS = 10
"""How long the hub may take to answer."""


def check_repository(
    kind: Literal["model", "dataset"], name: str, *, revision: str | None = None, token: str | None = None
) -> None:
    """Raise :class:`ArtifactError` where the hub has no ``name``, or is out of reach and the cache lacks it, too."""
    if constants.is_offline_mode() or _is_cached(kind, name):
        return  # the libraries answer quickly
    info = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        info(name, revision=revision, token=token, timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        at = f" at revision {revision!r}" if revision else ""
        raise ArtifactError(
            f"{kind}: expected a folder or a hub id, got {name!r}{at}, which neither is here nor on the hub"
            f"{close_by(name)}; private and gated ones need --hf-token"
        ) from None
    except Exception as error:  # of whatever HTTP library the hub's client uses
        raise ArtifactError(
            f"{kind}: expected a folder or a hub id, got {name!r}, which is not here, and the hub did not answer: "
            f"{first_line(error)}{close_by(name)}"
        ) from None


def looks_local(name: str) -> bool:
    """Whether ``name`` can only be a path: hub ids have at most one slash, and none in front."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def close_by(name: str) -> str:
    """``; did you mean ./my-model?`` where something of a similar name is there, else nothing."""
    path = Path(name).expanduser()
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _is_cached(kind: str, name: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir()
