"""dictionary_learning's folders: ``ae.pt``, a state_dict, beside ``config.json``.

Shapes: D width, L latents; its linear layers store ``decoder.weight [D, L]``. Files are read without running code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import write_json
from ...errors import CheckpointError
from ...version import __version__
from .. import files, fitting
from ..coder import Coder
from ..hook_names import layer_of

NAME = "dictionary_learning"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer", "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoder": "StandardTrainer",
}  # fmt: skip


def is_coder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def read(path: Path) -> Coder:
    trainer = files.read_json(path / CONFIG_FILE).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise CheckpointError(f"{path / CONFIG_FILE}: expected trainer.dict_class, got {sorted(trainer or {})}")
    return from_state(files.read_torch(path / WEIGHTS_FILE), trainer, path / WEIGHTS_FILE)


def from_state(state: dict[str, Any], trainer: dict[str, Any], where: Path) -> Coder:
    """The coder that ``dict_class`` would make of a state_dict."""
    kind, submodule = trainer["dict_class"], trainer.get("submodule_name")
    notes = {"dictionary_learning": {name: value for name, value in trainer.items() if _is_json(value)}}
    at: dict[str, Any] = {"model": trainer.get("lm_name"), "notes": notes}
    if isinstance(submodule, str):
        residual = re.fullmatch(r"resid_post_layer_(\d+)", submodule)
        at |= {"hook_name": f"blocks.{residual.group(1)}.hook_resid_post"} if residual else {"hookpoint": submodule}
    k = state.get("k", trainer.get("k"))
    at["k"] = int(k) if isinstance(k, (int, Tensor)) else None
    if kind == "AutoEncoderTopK":
        return Coder(**_linear(state, {"b_dec": "b_dec"}, where), activation="topk", **at)
    if kind == "BatchTopKSAE":
        found = _linear(state, {"b_dec": "b_dec"}, where)
    elif kind == "MatryoshkaBatchTopKSAE":
        found = _plain(state, {}, where)
    elif kind == "JumpReluAutoEncoder":
        return Coder(**_plain(state, {"threshold": "threshold"}, where), activation="jumprelu", centered=False, **at)
    elif kind == "AutoEncoder":
        return Coder(**_linear(state, {"b_dec": "bias"}, where), activation="relu", **at)
    elif kind == "AutoEncoderNew":
        return Coder(**_linear(state, {"b_dec": "decoder.bias"}, where), activation="relu", centered=False, **at)
    else:
        known = ", ".join([*_TRAINERS, "AutoEncoderNew", "MatryoshkaBatchTopKSAE"])
        raise CheckpointError(f"{where}: expected dict_class among {known}, got {kind!r}")
    shared = files.take(state, {"threshold": "threshold"}, where)["threshold"]
    if shared.numel() != 1:
        raise CheckpointError(f"{where}: expected one threshold, got shape {list(shared.shape)}")
    # -1 says that no threshold was learned; the library then lets every positive activation pass, as 0 does
    threshold = shared.to(found["b_enc"].dtype).clamp_min(0).reshape(()).expand_as(found["b_enc"]).clone()
    return Coder(**found, threshold=threshold, activation="jumprelu", **at)


def fit(coder: Coder) -> tuple[Coder, list[str]]:
    lost: list[str] = []
    if coder.transcode:
        fitting.impossible("dictionary_learning has no transcoders")
    coder = fitting.without_groupmax(coder, "dictionary_learning", lost)
    coder = fitting.without_layer_norm(coder, "dictionary_learning", lost)
    coder = fitting.without_skip(coder, "dictionary_learning", lost)
    return fitting.with_centering(coder, _class_of(coder) != "JumpReluAutoEncoder", lost), lost


def write(folder: Path, coders: dict[str, Coder]) -> None:
    for name, coder in coders.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        kind, state = to_state(coder)
        torch.save(state, folder / name / WEIGHTS_FILE)
        origin = coder.notes.get("dictionary_learning") or {}
        trainer = {
            **origin,
            "trainer_class": origin.get("trainer_class", _TRAINERS[kind]),
            "dict_class": kind,
            "activation_dim": coder.d_in,
            "dict_size": coder.num_latents,
            "layer": origin.get("layer", layer_of(coder.hookpoint or coder.hook_name)),
            "lm_name": coder.model,
            "submodule_name": coder.hookpoint or origin.get("submodule_name") or coder.hook_name,
        }
        if coder.k is not None:
            trainer["k"] = coder.k
        config = {"trainer": trainer, "buffer": {}, "converted_by": f"fastsae {__version__}"}
        write_json(folder / name / CONFIG_FILE, config)


def to_state(coder: Coder) -> tuple[str, dict[str, Tensor]]:
    """(dict_class, state_dict) of a fitted coder."""
    kind = _class_of(coder)
    t = {name: tensor.detach().to("cpu").contiguous() for name, tensor in coder.tensors().items()}
    if kind == "JumpReluAutoEncoder":
        names = ("b_enc", "W_dec", "b_dec", "threshold")
        return kind, {"W_enc": t["W_enc"].T.contiguous(), **{name: t[name] for name in names}}
    linear = {
        "encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.contiguous(),
        "bias" if kind == "AutoEncoder" else "b_dec": t["b_dec"],
    }  # fmt: skip
    if kind == "AutoEncoder":
        return kind, linear
    threshold = torch.tensor(-1.0) if coder.threshold is None else coder.threshold[0].float()
    return kind, {"k": torch.tensor(coder.k, dtype=torch.int), "threshold": threshold, **linear}


def _class_of(coder: Coder) -> str:
    if coder.threshold is None:
        return "AutoEncoderTopK" if coder.activation == "topk" else "AutoEncoder"
    one = bool((coder.threshold == coder.threshold[0]).all())
    return "BatchTopKSAE" if one and coder.k is not None and coder.centered else "JumpReluAutoEncoder"


def _linear(state: dict[str, Any], bias: dict[str, str], where: Path) -> dict[str, Any]:
    found = files.take(state, {**_LINEAR, **bias}, where)
    return {**found, "W_dec": files.matrix_t(found["W_dec"], "decoder.weight", where)}


def _plain(state: dict[str, Any], more: dict[str, str], where: Path) -> dict[str, Any]:
    found = files.take(state, {**_PLAIN, **more}, where)
    return {**found, "W_enc": files.matrix_t(found["W_enc"], "W_enc", where)}


def _is_json(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
