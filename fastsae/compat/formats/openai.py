"""OpenAI's sparse_autoencoder files (June 2024): one ``.pt`` file with a dict, plain values and tensors.

Shapes: D width, L latents; ``encoder.weight [L, D]``, ``decoder.weight [D, L]``.
Its TopK implies a layer norm of the input.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import CheckpointError
from .. import files, fitting
from ..coder import Coder

NAME = "openai"
WEIGHTS_FILE = "autoencoder.pt"
_TENSORS = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}


def is_coder(path: Path) -> bool:
    return (path.suffix == ".pt" and path.is_file() and path.name != "ae.pt") or (path / WEIGHTS_FILE).is_file()


def read(path: Path) -> Coder:
    file = path / WEIGHTS_FILE if path.is_dir() else path
    state = files.read_torch(file)
    activation, options = state.get("activation", "ReLU"), state.get("activation_state_dict") or {}
    if activation not in ("TopK", "ReLU"):
        raise CheckpointError(f"{file}: expected activation TopK or ReLU, got {activation!r}")
    k = options.get("k")
    if activation == "TopK" and options.get("postact_fn", "ReLU") != "ReLU":
        raise CheckpointError(f"{file}: expected TopK followed by ReLU, got {options['postact_fn']!r}")
    found = files.take(state, _TENSORS, file)
    return Coder(
        **{**found, "W_dec": files.matrix_t(found["W_dec"], "decoder.weight", file)},
        activation="topk" if activation == "TopK" else "relu",
        k=int(k) if isinstance(k, (int, torch.Tensor)) else None,
        layer_norm=activation == "TopK",
    )


def fit(coder: Coder) -> tuple[Coder, list[str]]:
    lost: list[str] = []
    if coder.transcode:
        fitting.impossible("OpenAI's format has no transcoders")
    coder = fitting.without_skip(coder, "OpenAI's format", lost)
    if coder.activation in ("jumprelu", "groupmax"):
        coder = fitting.as_topk(coder, "OpenAI's format", lost)
    if coder.activation == "topk" and not coder.layer_norm:
        lost.append(
            "OpenAI's TopK normalises its input to mean 0 and deviation 1, this coder was trained without: "
            "it would compute something else"
        )
    elif coder.activation == "relu":
        coder = fitting.without_layer_norm(coder, "OpenAI's ReLU", lost)
    return fitting.with_centering(coder, True, lost), lost


def write(folder: Path, coders: dict[str, Coder]) -> None:
    for name, coder in coders.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        tensors = {theirs: getattr(coder, ours).detach().to("cpu") for ours, theirs in _TENSORS.items()}
        tensors["decoder.weight"] = tensors["decoder.weight"].T
        state = {name: tensor.contiguous() for name, tensor in tensors.items()}
        state |= {  # as a new module of theirs has them
            "stats_last_nonzero": torch.zeros(coder.num_latents, dtype=torch.long),
            "latents_activation_frequency": torch.ones(coder.num_latents),
            "latents_mean_square": torch.zeros(coder.num_latents),
        }
        topk = coder.activation == "topk"
        kind = {"activation": "TopK" if topk else "ReLU"}
        options = {"activation_state_dict": {"k": coder.k, "postact_fn": "ReLU"} if topk else {}}
        torch.save({**state, **kind, **options}, folder / name / WEIGHTS_FILE)
