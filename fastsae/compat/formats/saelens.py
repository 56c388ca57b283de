"""SAELens 6's folders: ``cfg.json`` and ``sae_weights.safetensors``; SAELens itself is not needed.

Shapes: D width, L latents; SAELens stores ``W_enc [D, L]``. Read: inference and training folders of standard, topk,
batchtopk, matryoshka_batchtopk, jumprelu, their transcoders, and fastsae's plug-in classes; versions before 6 too.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...checkpoint import write_json
from ...errors import CheckpointError, HookpointError
from ...version import __version__
from .. import files, fitting
from ..coder import Activation, Coder
from ..hook_names import to_transformer_lens

NAME = "saelens"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.54.12"
"""The release whose layout is written; configs without a version of 6 or later are rewritten by SAELens on loading."""

_READ: dict[str, Activation] = {
    "standard": "relu", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu": "jumprelu", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
    "topk": "topk", "fastsae_topk": "topk", "fastsae_topk_transcoder": "topk",
    "batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu",
}  # fmt: skip
_WRITTEN = {
    ("topk", False, False): "topk", ("jumprelu", False, False): "jumprelu", ("relu", False, False): "standard",
    ("relu", True, False): "transcoder", ("relu", True, True): "skip_transcoder",
    ("jumprelu", True, False): "jumprelu_transcoder", ("jumprelu", True, True): "jumprelu_skip_transcoder",
    ("topk", True, False): "fastsae_topk_transcoder", ("topk", True, True): "fastsae_topk_transcoder",
}  # fmt: skip


def is_coder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def read(path: Path) -> Coder:
    return from_parts(files.read_json(path / CONFIG_FILE), files.read_safetensors(path / WEIGHTS_FILE), path)


def from_parts(cfg: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> Coder:
    """The coder that SAELens would make of a config and tensors."""
    cfg = _modern(cfg)
    architecture = cfg.get("architecture")
    if architecture not in _READ:
        raise CheckpointError(f"{where}: expected an architecture among {', '.join(_READ)}, got {architecture!r}")
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm"):
        raise CheckpointError(
            f"{where}: expected normalize_activations none or layer_norm, got {normalisation!r}, "
            "which is a property of the data; fold it into the weights in SAELens and save again"
        )
    activation, transcode = _READ[architecture], architecture.endswith("transcoder")
    threshold, tensors = _threshold(architecture, tensors, where)
    names = {"b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    if architecture.endswith("skip_transcoder") or "W_skip" in tensors:
        names["W_skip"] = "W_skip"
    if extra := set(tensors) - set(names.values()) - {"W_enc"}:
        raise CheckpointError(f"{where}: unexpected tensors {sorted(extra)}; not a plain {architecture} coder")
    found = files.take(tensors, {"W_enc": "W_enc", **names}, where)
    found["W_enc"] = files.matrix_t(found["W_enc"], "W_enc", where)
    if threshold is not None:
        found["threshold"] = threshold
    metadata = {**(cfg.get("metadata") or {})}
    coder = Coder(
        **found,
        activation=activation,
        k=_whole(cfg.get("k")) if architecture not in ("standard", "jumprelu") else None,
        centered=not transcode and bool(cfg.get("apply_b_dec_to_input", True)),
        transcode=transcode,
        layer_norm=normalisation == "layer_norm",
        hookpoint=metadata.get("hf_hook_name"),
        hook_name=metadata.get("hook_name"),
        model=metadata.get("model_name"),
        notes={"saelens": {"metadata": metadata, "reshape_activations": cfg.get("reshape_activations", "none")}},
    )
    for name, width in (("d_in", coder.d_in), ("d_sae", coder.num_latents), ("d_out", coder.d_out)):
        if cfg.get(name, width) != width:
            raise CheckpointError(f"{where}: {CONFIG_FILE} says {name} = {cfg[name]}, the weights say {width}")
    return _unscaled(coder) if cfg.get("rescale_acts_by_decoder_norm") else coder


def fit(coder: Coder) -> tuple[Coder, list[str]]:
    lost: list[str] = []
    coder = fitting.without_groupmax(coder, "SAELens", lost)
    if not coder.transcode:
        return fitting.without_skip(coder, "SAELens", lost), lost
    coder = fitting.with_centering(coder, False, lost)
    return fitting.without_layer_norm(coder, "SAELens' transcoder", lost), lost


def write(folder: Path, coders: dict[str, Coder]) -> None:
    for name, coder in coders.items():
        cfg, tensors = to_parts(coder)
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / WEIGHTS_FILE)
        write_json(folder / name / CONFIG_FILE, cfg)


def to_parts(coder: Coder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a fitted coder, as SAELens holds them: one dtype, the widest of the coder's."""
    architecture = _WRITTEN[coder.activation, coder.transcode, coder.W_skip is not None]
    tensors = {name: tensor.contiguous() for name, tensor in coder.to(coder.dtype).tensors().items()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    origin = coder.notes.get("saelens") or {}
    cfg = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.num_latents,
        "dtype": str(coder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.centered,
        "normalize_activations": "layer_norm" if coder.layer_norm else "none",
        "reshape_activations": origin.get("reshape_activations", "none"),
        "metadata": _metadata(coder, origin.get("metadata")),
    }
    if coder.activation == "topk":
        cfg |= {"k": coder.k}
    if architecture == "topk":
        cfg |= {"rescale_acts_by_decoder_norm": False}
    if coder.transcode:
        cfg |= {"d_out": coder.d_out}
    if architecture == "fastsae_topk_transcoder":
        cfg |= {"skip_connection": coder.W_skip is not None}
    return cfg, tensors


def _metadata(coder: Coder, origin: dict[str, Any] | None) -> dict[str, Any]:
    known: dict[str, Any] = {"model_name": coder.model, "hf_hook_name": coder.hookpoint}
    if origin is None:  # trained on the raw activations of a Hugging Face model
        known["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    with suppress(HookpointError):  # a place that TransformerLens has no name for
        known["hook_name"] = coder.hook_name or to_transformer_lens(coder.hookpoint or "")
    known["converted_by"] = f"fastsae {__version__}"
    return {**(origin or {}), **{k: v for k, v in known.items() if v is not None}, "sae_lens_version": FORMAT_VERSION}


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config from before version 6, or one without a version, under today's keys."""
    if isinstance(cfg.get("metadata"), dict) and cfg["metadata"].get("sae_lens_version"):
        return cfg
    cfg = {"architecture": "standard", **cfg}
    if "topk" in (cfg.get("activation_fn"), cfg.get("activation_fn_str")):
        options = cfg.get("activation_fn_kwargs") or {}
        cfg |= {"architecture": "topk", "k": options.get("k", cfg.get("k"))}
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    found = {name: cfg[name] for name in ("model_name", "hook_name", "hf_hook_name") if cfg.get(name)}
    if cfg.get("hook_point"):
        found["hook_name"] = cfg["hook_point"]
    return {**cfg, "metadata": {**found, **(cfg.get("metadata") or {})}}


def _threshold(architecture: str, tensors: dict[str, Tensor], where: Path) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(thresholds [L] or None, the other tensors); a BatchTopK training folder has one threshold for all."""
    others = {name: t for name, t in tensors.items() if name not in ("threshold", "topk_threshold")}
    if _READ[architecture] != "jumprelu":
        return None, others
    shared = architecture in ("batchtopk", "matryoshka_batchtopk")
    name = "topk_threshold" if shared else "threshold"
    threshold = files.take(tensors, {"threshold": name}, where)["threshold"]
    bias = files.take(tensors, {"b_enc": "b_enc"}, where)["b_enc"]
    if not shared:
        return threshold, others
    if threshold.numel() != 1:
        raise CheckpointError(f"{where}: expected one topk_threshold, got shape {list(threshold.shape)}")
    return threshold.to(bias.dtype).reshape(()).expand_as(bias).clone(), others


def _unscaled(coder: Coder) -> Coder:
    """Fold the decoder's norms into the encoder, as SAELens does when it saves for inference."""
    norms = coder.W_dec.float().norm(dim=1, keepdim=True).clamp_min(1e-8)
    return coder.replace(W_enc=coder.W_enc * norms, b_enc=coder.b_enc * norms.squeeze(1), W_dec=coder.W_dec / norms)


def _whole(k: Any) -> int | None:
    return int(k) if isinstance(k, (int, float)) and not isinstance(k, bool) and k >= 1 else None
