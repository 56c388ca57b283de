"""sparsify's folders, which are fastsae's own: ``cfg.json`` and ``sae.safetensors`` per coder.

Shapes: D width, L latents. sparsify's hold TopK and GroupMax coders of equal input and output widths; fastsae's
transcoders may have two (``d_out`` in cfg.json).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import checkpoint
from ...coder_config import SaeConfig
from ...errors import CheckpointError
from ...sae import FastSae
from .. import fitting
from ..coder import Coder

NAME = "sparsify"
_TRAINING = ("expansion_factor", "normalize_decoder", "multi_topk", "matryoshka_widths")


def is_coder(path: Path) -> bool:
    return (path / checkpoint.CONFIG_FILE).is_file() and (path / checkpoint.WEIGHTS_FILE).is_file()


def read(path: Path) -> Coder:
    cfg, _, tensors, notes = checkpoint.read_coder(path)
    if "W_dec" not in tensors:
        raise CheckpointError(f"{path}: expected a decoder, got a file without W_dec")
    hookpoint = path.parent.name if path.name.startswith("seed") else path.name
    return from_parts(cfg, tensors, {"hookpoint": hookpoint, **notes})


def from_fastsae(sae: FastSae) -> Coder:
    """A :class:`FastSae` as a :class:`Coder`; the tensors are shared."""
    if sae.W_dec is None:
        raise CheckpointError("expected a decoder, got a coder that was loaded with decoder=False")
    return from_parts(sae.cfg, {name: tensor.detach() for name, tensor in sae.state_dict().items()}, sae.notes)


def from_parts(cfg: SaeConfig, tensors: dict[str, Tensor], notes: dict[str, Any]) -> Coder:
    threshold = None
    if cfg.activation == "batchtopk":  # at inference every activation above one threshold: a JumpReLU
        if tensors["threshold"] < 0:
            raise CheckpointError("expected a BatchTopK coder whose threshold training has set, got an untrained one")
        threshold = tensors["threshold"].expand_as(tensors["encoder.bias"]).clone()
    return Coder(
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        activation="jumprelu" if cfg.activation == "batchtopk" else cfg.activation,
        threshold=threshold,
        k=cfg.k,
        centered=not cfg.transcode,
        transcode=cfg.transcode,
        hookpoint=_text(notes.get("hookpoint")),
        hook_name=_text(notes.get("hook_name")),
        model=_text(notes.get("model")),
        notes={**notes, **{name: getattr(cfg, name) for name in _TRAINING}},
    )


def fit(coder: Coder) -> tuple[Coder, list[str]]:
    if coder.d_in != coder.d_out:
        fitting.impossible(f"sparsify's coders have one width, this one has {coder.d_in} in and {coder.d_out} out")
    return _fit_topk(coder)


def _fit_topk(coder: Coder) -> tuple[Coder, list[str]]:
    lost: list[str] = []
    if coder.activation != "groupmax":
        coder = fitting.as_topk(coder, "sparsify", lost)
    coder = fitting.without_layer_norm(coder, "sparsify", lost)
    return fitting.with_centering(coder, not coder.transcode, lost), lost


def fit_native(coder: Coder) -> tuple[Coder, list[str]]:
    """As :func:`fit`, for fastsae itself, which computes BatchTopK's threshold and transcoders of two widths too."""
    if not is_batch_topk(coder):
        return _fit_topk(coder)
    lost: list[str] = []
    coder = fitting.without_layer_norm(coder, "fastsae", lost)
    return fitting.with_centering(coder, not coder.transcode, lost), lost


def is_batch_topk(coder: Coder) -> bool:
    """Whether it is what BatchTopK computes at inference: one threshold for all latents, not negative."""
    if coder.threshold is None:
        return False
    return bool((coder.threshold == coder.threshold[0]).all() and coder.threshold[0] >= 0)


def write(folder: Path, coders: dict[str, Coder]) -> None:
    for name, coder in coders.items():
        cfg, tensors, notes = to_parts(coder)
        checkpoint.write_coder(folder / name, cfg, (coder.d_in, coder.d_out), tensors, notes)


def to_parts(coder: Coder) -> tuple[SaeConfig, dict[str, Tensor], dict[str, Any]]:
    """(config, tensors, notes) of a fitted coder, as a checkpoint holds them."""
    notes = {name: value for name, value in coder.notes.items() if name not in _TRAINING}
    facts = {"hookpoint": coder.hookpoint, "hook_name": coder.hook_name, "model": coder.model}
    training = {name: coder.notes[name] for name in _TRAINING if name in coder.notes}
    training.setdefault("normalize_decoder", _unit_rows(coder.W_dec))
    cfg = SaeConfig.from_dict(
        {
            **training,
            "activation": coder.activation if coder.threshold is None else "batchtopk",
            "k": coder.k or min(SaeConfig.k, coder.num_latents),  # unknown: a threshold alone decides at inference
            "num_latents": coder.num_latents,
            "skip_connection": coder.W_skip is not None,
            "transcode": coder.transcode,
        }
    )
    tensors = {"encoder.weight": coder.W_enc, "encoder.bias": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    if coder.threshold is not None:
        tensors["threshold"] = coder.threshold[0].float().clone()
    return cfg, tensors, {**notes, **{name: value for name, value in facts.items() if value is not None}}


def to_fastsae(coder: Coder) -> FastSae:
    """A coder that loses nothing by it as a :class:`FastSae`; else :class:`CheckpointError` with the reasons."""
    fitted, lost = fit_native(coder)
    if lost:
        raise CheckpointError(f"expected a coder that FastSae can compute: {'; '.join(lost)}")
    cfg, tensors, notes = to_parts(fitted)
    with torch.device("meta"):
        sae = FastSae(coder.d_in, cfg, device="meta", d_out=coder.d_out)
    sae.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
    sae.notes = notes
    return sae.requires_grad_(True)


def _unit_rows(W_dec: Tensor) -> bool:
    norms = W_dec.float().norm(dim=1)
    return bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
