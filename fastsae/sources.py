"""Datasets by name: hub ids, save_to_disk folders, files of every kind, whole or streamed.

``datasets.load_dataset`` does the work; here are what names mean, and one-line errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from pyarrow import ArrowInvalid

from . import demo
from .errors import ArtifactError
from .hub import check_repository, close_by, looks_local
from .memmap import SUFFIX as MEMMAP_SUFFIX
from .run_config import RunConfig
from .stream import UNREADABLE, reason

DEFAULT_DATASET = "EleutherAI/SmolLM2-135M-10B"
"""What ``fastsae train MODEL`` trains on, as sparsify does."""

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def load_data(name: str, run: RunConfig) -> Dataset | IterableDataset:
    """The dataset ``name``: a hub id, a ``save_to_disk`` folder, a file or folder of parquet, jsonl, json, csv,
    arrow or txt files (one document each), compressed or not, or ``stdlib``, the running Python's standard library.

    With ``run.streaming`` nothing is read yet; ``run.data_args`` go to ``datasets.load_dataset``.
    """
    path = Path(name).expanduser()
    if name == demo.DATASET:
        return _load_files("text", demo.stdlib_sources(), run)
    if path.is_file():
        return _load_files(_builder(path), [path], run)
    if path.is_dir():
        if is_saved(path):
            return _load_saved(path, name, run)
        files = (file for file in path.rglob("*") if _suffix(file) in _BUILDERS and file.is_file())
        builders = {_builder(file) for file in files}
        if len(builders) != 1:
            raise ArtifactError(
                f"dataset: expected a save_to_disk folder, or one kind of file in {name} ({', '.join(_BUILDERS)}), "
                f"found {', '.join(sorted(builders)) or 'none'}"
            )
        return _read(builders.pop(), path, run, path=str(path))  # splits are told by names, as on the hub
    if looks_local(name) or _suffix(path) in _BUILDERS:
        raise ArtifactError(
            f"dataset: expected a file, a folder or a hub id, got {name!r}, which does not exist here{close_by(name)}"
        )
    return _load_hub(name, run)


def is_saved(path: Path) -> bool:
    """Whether ``path`` is a ``save_to_disk`` folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _builder(path: Path) -> str:
    if _suffix(path) not in _BUILDERS:
        raise ArtifactError(
            f"dataset: expected one of {', '.join(_BUILDERS)} (also with {', '.join(_COMPRESSED)} behind it), "
            f"or token ids as {MEMMAP_SUFFIX}, got {path.name}"
        )
    return _BUILDERS[_suffix(path)]


def _suffix(path: Path) -> str:
    """``.jsonl`` of ``c4.jsonl.gz``, too."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _load_files(builder: str, files: list[Path], run: RunConfig) -> Dataset | IterableDataset:
    if run.split != "train":
        raise ArtifactError(f"dataset: {files[0].name} has the split train only, not {run.split!r}; leave --split out")
    return _read(builder, files[0], run, data_files=[str(file) for file in files])


def _read(builder: str, source: Path, run: RunConfig, **options: Any) -> Dataset | IterableDataset:
    if builder == "text":
        options["sample_by"] = "document"
    path = options.pop("path", builder)
    try:
        return load_dataset(path, split=run.split, streaming=run.streaming, **{**options, **run.dataset_options()})
    except StopIteration:  # of a json file without a byte
        raise ArtifactError(f"dataset: expected at least one row, got an empty file in {source}") from None
    except (DatasetNotFoundError, TypeError, *UNREADABLE) as error:
        way_out = "; pip install zstandard" if "zstd" in str(error) else ""
        raise ArtifactError(f"dataset: could not read {source} as {builder}: {reason(error)}{way_out}") from None


def _load_saved(folder: Path, name: str, run: RunConfig) -> Dataset | IterableDataset:
    if run.data_args:
        raise ArtifactError(f"dataset: {name} is a save_to_disk folder, which takes no --data-args; leave them out")
    try:
        data = _pick_split(load_from_disk(str(folder)), name, run.split)
    except IndexError:  # datasets cannot read back what it saved
        raise ArtifactError("dataset: expected at least one row, got an empty dataset") from None
    except (OSError, KeyError, ArrowInvalid, UnicodeDecodeError) as error:
        raise ArtifactError(f"dataset: could not read {name} as a save_to_disk folder: {reason(error)}") from None
    return data.to_iterable_dataset() if run.streaming else data


def _load_hub(name: str, run: RunConfig) -> Dataset | IterableDataset:
    options = run.dataset_options()
    check_repository("dataset", name, revision=options.get("revision"), token=run.hf_token)
    try:
        return load_dataset(name, split=run.split, streaming=run.streaming, token=run.hf_token, **options)
    except (DatasetNotFoundError, TypeError, *UNREADABLE) as error:
        raise ArtifactError(
            f"dataset: expected a hub id, a file or a folder, got {name!r}: {reason(error)} "
            "Check the name, the network, --data-args and --hf-token; 'stdlib' needs none of them"
        ) from None


def _pick_split(data: Dataset | DatasetDict, name: str, split: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if split not in data:
        raise ArtifactError(
            f"dataset: {name} has the splits {', '.join(map(str, data))}, not {split!r}; choose with --split"
        )
    return data[split]
