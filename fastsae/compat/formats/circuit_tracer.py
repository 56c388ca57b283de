"""circuit-tracer's transcoder sets: ``layer_N.safetensors`` for every layer, beside ``config.yaml``.

Shapes: D width, L latents; ``W_enc [L, D]``, ``W_dec [L, D]``, optionally ``W_skip [D, D]`` and
``activation_function.threshold [L]``. TopK is a word in config.yaml, which releases after 0.5.0 read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from ...errors import CheckpointError
from ...version import __version__
from .. import files, fitting
from ..coder import Coder
from ..hook_names import layer_of

NAME = "circuit_tracer"
CONFIG_FILE = "config.yaml"
THRESHOLD = "activation_function.threshold"
_HOOKS = ("feature_input_hook", "feature_output_hook")
INPUT_HOOK, OUTPUT_HOOK = "mlp.hook_in", "mlp.hook_out"


def is_coder(path: Path) -> bool:
    return _layer(path) is not None and path.is_file()


def read(path: Path) -> Coder:
    """One layer's file, with what the ``config.yaml`` beside it says."""
    tensors = files.read_safetensors(path)
    config = files.read_yaml(path.parent / CONFIG_FILE) if (path.parent / CONFIG_FILE).is_file() else {}
    if config.get("model_kind", "transcoder_set") != "transcoder_set":
        raise CheckpointError(f"{path.parent}: expected model_kind transcoder_set, got {config['model_kind']!r}")
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {
        ours: theirs for ours, theirs in {"W_skip": "W_skip", "threshold": THRESHOLD}.items() if theirs in tensors
    }
    activation = "jumprelu" if "threshold" in names else config.get("activation", "relu")
    if activation not in ("topk", "relu", "jumprelu"):
        raise CheckpointError(f"{path.parent}: expected activation topk or relu, got {activation!r}")
    k = config.get("k")
    layer, output = _layer(path) or 0, str(config.get("feature_output_hook", OUTPUT_HOOK))
    hookpoints = dict(enumerate(config.get("hf_hookpoints") or []))
    return Coder(
        **files.take(tensors, names, path),
        activation=activation,
        k=k if activation == "topk" and isinstance(k, int) else None,
        centered=False,
        transcode=True,
        hookpoint=hookpoints.get(layer),
        hook_name=f"blocks.{layer}.{'hook_mlp_out' if output == OUTPUT_HOOK else output}",
        model=config.get("model_name"),
        notes={"circuit_tracer": {name: config[name] for name in _HOOKS if isinstance(config.get(name), str)}},
    )


def fit(coder: Coder) -> tuple[Coder, list[str]]:
    lost: list[str] = []
    if not coder.transcode:
        fitting.impossible("circuit-tracer holds transcoders of MLPs, this is an autoencoder")
    if coder.d_in != coder.d_out:
        fitting.impossible(f"circuit-tracer's transcoders have one width, this has {coder.d_in} and {coder.d_out}")
    if layer_of(coder.hookpoint or coder.hook_name) is None:
        fitting.impossible(f"circuit-tracer numbers its files by layer, and {coder.hookpoint!r} names none")
    coder = fitting.without_groupmax(coder, "circuit-tracer", lost)
    coder = fitting.without_layer_norm(coder, "circuit-tracer", lost)
    return fitting.with_centering(coder, False, lost), lost


def write(folder: Path, coders: dict[str, Coder]) -> None:
    """A set: a transcoder for every layer from 0 on, all of one width, activation and k."""
    layers = {layer_of(coder.hookpoint or coder.hook_name): coder for coder in coders.values()}
    if sorted(layers, key=str) != sorted(range(len(coders)), key=str):
        got = ", ".join(coders)
        raise CheckpointError(f"circuit-tracer expects one transcoder for every layer from 0 on, got {got}")
    kinds = {(c.activation, c.k if c.activation == "topk" else None, c.d_in, c.num_latents) for c in coders.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"circuit-tracer expects transcoders of one activation, k and width, got {sorted(kinds)}")
    folder.mkdir(parents=True, exist_ok=True)
    for layer, coder in layers.items():
        tensors = {THRESHOLD if n == "threshold" else n: t.contiguous() for n, t in coder.tensors().items()}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    coder = next(iter(coders.values()))
    hooks: dict[str, Any] = {"feature_input_hook": INPUT_HOOK, "feature_output_hook": OUTPUT_HOOK}
    config = {"model_name": coder.model, "model_kind": "transcoder_set", **hooks}
    config |= coder.notes.get("circuit_tracer") or {}
    if coder.activation != "jumprelu":
        config["activation"] = coder.activation
    if coder.activation == "topk":
        config["k"] = coder.k
    config["hf_hookpoints"] = [layers[layer].hookpoint for layer in range(len(layers))]
    config["converted_by"] = f"fastsae {__version__}"
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False))


def _layer(path: Path) -> int | None:
    found = re.fullmatch(r"layer_(\d+)\.safetensors", path.name)
    return int(found.group(1)) if found else None
