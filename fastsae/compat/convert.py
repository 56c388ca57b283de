"""Coders of every format, found, read, written and converted; what would be lost is refused with the reason."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from natsort import natsorted

from .. import coder_folders
from ..errors import ArtifactError, CheckpointError, FastsaeError
from . import files
from .coder import Coder
from .formats import circuit_tracer, dictionary_learning, openai, saelens, sparsify

FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (sparsify, saelens, dictionary_learning, openai, circuit_tracer)
}
_DEPTH = 3
_NOT_CODERS = {"best", "state"}


class Found(NamedTuple):
    """One coder on disk."""

    format: str
    path: Path


def find(source: Path | str) -> dict[str, Found]:
    """Coders at or below a folder by name ("" for the folder itself), in natural order; a file may be named too."""
    source = Path(source)
    if format := _format_of(source):
        return {"": Found(format, source)}
    if source.is_file():  # one of the files of a coder's folder
        source = source.parent
        if format := _format_of(source):
            return {"": Found(format, source)}
    found: dict[str, Found] = {}
    _search(source, source, found)
    return {name: found[name] for name in natsorted(found)}


def load_all(source: Path | str, hookpoint: str | None = None, *, rename: bool = True) -> dict[str, Coder]:
    """Every coder of a folder, a file or a hub repository, by name; only the one at ``hookpoint`` where given.

    Names are hookpoints where the files know them (``layer_0`` becomes ``h.0.mlp``), or else, and without
    ``rename``, the folders' own.
    Raises :class:`CheckpointError` where there is none, or one is damaged.
    """
    root = locate(source, hookpoint)
    found = find(root)
    if hookpoint is not None:
        found = {name: at for name, at in found.items() if name == hookpoint} or _missing(hookpoint, found, root)
    if not found:
        raise CheckpointError(f"{root}: expected coders of one of {', '.join(FORMATS)}, found none of them")
    coders = {name: _read(at) for name, at in found.items()}
    names = {name: coder.hookpoint or name for name, coder in coders.items()}
    if rename and len(coders) > 1 and len(set(names.values())) == len(names):
        coders = {names[name]: coder for name, coder in coders.items()}
    return {name and files.safe_name(name): coder for name, coder in coders.items()}


def load(source: Path | str, hookpoint: str | None = None) -> Coder:
    """The one coder of a folder, file or hub repository, or the one at ``hookpoint``."""
    coders = load_all(source, hookpoint)
    if len(coders) > 1:
        raise CheckpointError(f"{source}: expected one coder, found {', '.join(coders)}; name one with hookpoint=")
    return next(iter(coders.values()))


def save(coders: dict[str, Coder], folder: Path | str, to: str, *, force: bool = False) -> list[str]:
    """Write coders by name in the format ``to``; returns what was lost, which is nothing unless ``force``.

    The folder appears complete or not at all. Raises :class:`CheckpointError` with the reasons where something
    would be lost, and :class:`ArtifactError` where the folder is taken.
    """
    if to not in FORMATS:
        raise CheckpointError(f"expected a format among {', '.join(FORMATS)}, got {to!r}")
    folder, fitted, lost = Path(folder), {}, []
    for name, coder in coders.items():
        try:
            fitted[files.safe_name(name) if name else ""], reasons = FORMATS[to].fit(coder)
        except CheckpointError as error:
            raise CheckpointError(f"{name or 'the coder'}: {error}") from None
        lost += [f"{name}: {reason}" if name else reason for reason in reasons]
    if lost and not force:
        raise CheckpointError(f"{to} cannot hold this without loss: {'; '.join(lost)}. Write it all the same: --force")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"output: expected a new or empty folder, got {folder}; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        FORMATS[to].write(beside, fitted)
        beside.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return lost


def convert(
    source: Path | str, folder: Path | str, to: str, *, hookpoint: str | None = None, force: bool = False
) -> tuple[list[str], list[str]]:
    """Read ``source`` and write it in the format ``to``: (names of the coders, what was lost)."""
    coders = load_all(source, hookpoint)
    return list(coders), save(coders, folder, to, force=force)


def locate(source: Path | str, hookpoint: str | None = None) -> Path:
    """A local path, or the snapshot of a hub repository."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"expected a folder, a file or a hub repository (org/name), got {name!r}: no such path")
    return coder_folders.download(name, None if hookpoint is None else f"{files.safe_name(hookpoint)}/*")


def _read(at: Found) -> Coder:
    try:
        return FORMATS[at.format].read(at.path)
    except FastsaeError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # a stranger's file may hold a value of any type anywhere
        raise CheckpointError(f"{at.path}: a {at.format} coder with an unexpected value ({error})") from None


def _format_of(path: Path) -> str | None:
    return next((name for name, module in FORMATS.items() if module.is_coder(path)), None)


def _search(root: Path, folder: Path, found: dict[str, Found]) -> None:
    depth = len(folder.relative_to(root).parts)
    if depth >= _DEPTH or not folder.is_dir():
        return
    for path in folder.iterdir():
        name = path.relative_to(root).as_posix().removesuffix(".safetensors")
        if path.name.startswith(".") or path.name in _NOT_CODERS or path.suffix == ".pt":
            continue
        if format := _format_of(path):
            found[name] = Found(format, path)
        else:
            _search(root, path, found)


def _missing(hookpoint: str, found: dict[str, Found], root: Path) -> dict[str, Found]:
    if list(found) == [""]:  # the folder is the coder itself
        return found
    raise CheckpointError(f"no coder {hookpoint!r} in {root}; it holds: {', '.join(found) or 'none'}")
