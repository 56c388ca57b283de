"""Coders that go on from saved ones (``--finetune``), of any format that fastsae reads."""

from __future__ import annotations

import logging

import torch

from .errors import CheckpointError
from .finetune import match_coders
from .origin import Origin, misfits
from .row_optimizer import on_sphere
from .sae import FastSae
from .saved import load_coders

logger = logging.getLogger("fastsae")

ALIKE = ("activation", "transcode", "skip_connection")


def load_pretrained(coders: dict[str, FastSae], source: str, model_name: str) -> dict[str, Origin]:
    """Give every coder the weights of its saved counterpart in ``source``, a folder or a hub id; where each is from.

    k may differ. Raises :class:`CheckpointError` where a coder has no counterpart, or one of another shape; warns
    where it was trained on another hookpoint or model.
    """
    saved = load_coders(source)
    origins = {}
    for name, other in match_coders(coders, saved).items():
        _check_alike(name, coders[name], saved[other])
        origins[name] = Origin.from_notes(saved[other].notes)
        for wrong in misfits(origins[name], Origin(model=model_name, hookpoint=name.partition("/")[0])):
            logger.warning("%s: finetune: %s", name, wrong)
        _copy(name, coders[name], saved[other])
    return origins


def warn_of_other_size(name: str, origin: Origin, size: dict[str, float]) -> None:
    """Warn where a coder's activations are not as large as those that it was trained on."""
    here = Origin(activation_mean=size["activation_mean"], activation_norm=size["activation_norm"])
    for wrong in misfits(origin, here):
        logger.warning("%s: finetune: %s", name, wrong)


def _check_alike(name: str, coder: FastSae, saved: FastSae) -> None:
    ours, theirs = (
        {"d_in": c.d_in, "d_out": c.d_out, "num_latents": c.all_latents} | {f: getattr(c.cfg, f) for f in ALIKE}
        for c in (coder, saved)
    )
    for field, value in ours.items():
        if value != theirs[field]:
            is_width = field in ("d_in", "d_out")
            way_out = "train at its hookpoint" if is_width else f"set --{field.replace('_', '-')} to the same"
            raise CheckpointError(
                f"finetune: {name}: expected a saved coder with {field} = {value}, got {theirs[field]}; {way_out}"
            )


@torch.no_grad()
def _copy(name: str, coder: FastSae, saved: FastSae) -> None:
    coder.load_whole(saved.state_dict())
    if not on_sphere(coder):
        return
    assert coder.W_dec is not None
    norms = coder.W_dec.norm(dim=1)
    if (norms - 1).abs().max() > 1e-4:  # as sparsify's are; ours differ by rounding
        logger.warning(
            "%s: finetune: decoder rows of norm %.3g to %.3g are brought to norm 1; --no-normalize-decoder keeps them",
            name, norms.min(), norms.max(),
        )  # fmt: skip
        coder.set_decoder_norm_to_unit_norm()
