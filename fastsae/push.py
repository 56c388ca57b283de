"""``fastsae push``: coders to a hub repository, with a model card; shows what would go unless told to send it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .compat import convert, files
from .errors import ArtifactError, first_line
from .model_card import model_card

CARD = "README.md"
_OF_A_CODER = {
    "sparsify": ("cfg.json", "sae.safetensors"),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "openai": ("autoencoder.pt",),
    "circuit_tracer": (),
}
_OF_A_RUN = ("config.json", "config.yaml", "eval.json")


def planned_files(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """What would be in the repository: the card, the coders' files, config.json and eval.json; nothing else.

    Every coder is read first, so that a damaged one is not published. A README.md in the folder is taken as the card.
    Raises :class:`ArtifactError` and :class:`CheckpointError`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ArtifactError(f"push: expected a repository like org/name, got {repo!r}: {error}") from None
    if not folder.is_dir():
        raise ArtifactError(f"push: expected a folder with coders, got {folder}, which is none")
    coders, found = convert.load_all(folder, rename=False), convert.find(folder)
    planned: dict[str, Path | bytes] = {}
    for at in found.values():
        parts = [at.path] if at.path.is_file() else [at.path / name for name in _OF_A_CODER[at.format]]
        planned |= {path.relative_to(folder).as_posix(): path for path in parts}
    planned |= {name: folder / name for name in _OF_A_RUN if (folder / name).is_file()}
    values = {name: files.read_json(folder / name) for name in ("config.json", "eval.json") if name in planned}
    formats = {at.format for at in found.values()}
    card = model_card(repo, coders, formats, values.get("config.json", {}), values.get("eval.json", {}))
    written = folder / CARD
    return {CARD: written if written.is_file() else card.encode(), **dict(sorted(planned.items()))}


def upload(planned: Mapping[str, Path | bytes], repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Send the files in one commit, making the repository if need be; returns its address.

    Raises :class:`ArtifactError` where the hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, content) for name, content in planned.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Upload coders with fastsae")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ArtifactError(
            f"push: expected to write to {repo!r}, got: {first_line(error)}; "
            "log in with hf auth login, or pass --hf-token"
        ) from None
    return str(commit.repo_url)


def size(content: Path | bytes) -> int:
    """Bytes of one planned file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def text(content: Path | bytes) -> str:
    """A planned text file's content."""
    return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")
