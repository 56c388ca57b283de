"""Names of the same place in a model: Hugging Face's modules and TransformerLens' hook points, both ways."""

from __future__ import annotations

import re
from typing import Literal

from ..errors import HookpointError

Family = Literal["gpt2", "llama", "gpt_neox"]

_HOOKS = {"": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out", "act": "mlp.hook_post"}
_PLACES = {hook: place for place, hook in _HOOKS.items()}
_MODULES: dict[Family, dict[str, str]] = {
    "gpt2": {"list": "h", "mlp": "mlp", "attn": "attn", "act": "mlp.act"},
    "llama": {"list": "layers", "mlp": "mlp", "attn": "self_attn", "act": "mlp.act_fn"},
    "gpt_neox": {"list": "layers", "mlp": "mlp", "attn": "attention", "act": "mlp.act"},
}
_EMBEDDINGS: dict[Family, str] = {"gpt2": "wte", "llama": "embed_tokens", "gpt_neox": "embed_in"}
_PLACE_OF = {"": "", **{modules[place]: place for modules in _MODULES.values() for place in ("mlp", "attn", "act")}}
_LAYER = re.compile(r"(?:.+\.)?(?:h|layers)\.(\d+)(?:\.(.+))?")


def layer_of(name: str | None) -> int | None:
    """The layer that a Hugging Face module or a TransformerLens hook belongs to, if it names one."""
    found = re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)(?:\.|$)", name or "")
    return int(found.group(1)) if found else None


def to_transformer_lens(hookpoint: str) -> str:
    """``h.3.mlp.act -> blocks.3.mlp.hook_post``; raises :class:`HookpointError` for a place without a counterpart.

    Names only. On gated MLPs (Llama) ``mlp.act_fn`` gives act(gate) and TransformerLens' ``mlp.hook_post``
    act(gate)·up: a coder trained on the one must not be fed the other.
    """
    if hookpoint.rpartition(".")[2] in _EMBEDDINGS.values():
        return "hook_embed"
    found = _LAYER.fullmatch(hookpoint)
    if not found or (found.group(2) or "") not in _PLACE_OF:
        raise HookpointError(
            f"expected a layer, its MLP, its activation function or its attention, got {hookpoint!r}, "
            "for which no TransformerLens hook is known; names look like h.3, layers.3.mlp, h.3.mlp.act, h.3.attn"
        )
    return f"blocks.{found.group(1)}.{_HOOKS[_PLACE_OF[found.group(2) or '']]}"


def from_transformer_lens(hook_name: str, family: Family = "gpt2") -> str:
    """``blocks.3.hook_mlp_out -> h.3.mlp``, in the module names of a model ``family``."""
    if family not in _MODULES:
        raise HookpointError(f"family: expected one of {', '.join(_MODULES)}, got {family!r}")
    if hook_name == "hook_embed":
        return _EMBEDDINGS[family]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if not found or found.group(2) not in _PLACES:
        raise HookpointError(f"expected blocks.N. with one of {', '.join(_PLACES)}, or hook_embed, got {hook_name!r}")
    modules, place = _MODULES[family], _PLACES[found.group(2)]
    return f"{modules['list']}.{found.group(1)}" + (f".{modules[place]}" if place else "")
