"""``fastsae encode``: the strongest latents at every token of a text.

Shapes: S tokens, D width, K active latents.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .devices import resolve_device
from .encode_config import EncodeConfig
from .errors import ArtifactError
from .hooks import run_hooked
from .model import load_model, load_tokenizer
from .options import build
from .placement import entry_device
from .run_config import RunConfig
from .sae import FastSae
from .saved import check_origin, check_places, coder_input, default_model, load_coders, run_record
from .token_text import token_texts, visible
from .tokens import context_length, document_start


class Firing(NamedTuple):
    """One latent at one token."""

    latent: int
    activation: float


def strongest_latents(
    coders: dict[str, FastSae],
    model: Any,
    input_ids: Tensor,  # int64 [S]
    top: int = 5,
) -> dict[str, list[list[Firing]]]:
    """By coder and token: the up to ``top`` active latents with the largest activations, the largest first.

    ``coders`` as ``FastSae.load_many`` gives them, on the model's device; raises :class:`CheckpointError` where one
    does not fit the module that it is named after.
    """
    calls = check_places(model, coders.items())
    found: dict[str, list[list[Firing]]] = {}

    @torch.no_grad()
    def look(hookpoint: str, x: Tensor | None, y: Tensor) -> None:
        for name, coder in coders.items():
            if name.partition("/")[0] == hookpoint:
                acts, indices, _ = coder.encode(coder_input(coder, x, y)[0])
                found[name] = [
                    [Firing(i, a) for a, i in zip(*row, strict=True) if a > 0]
                    for row in zip(acts[:, :top].tolist(), indices[:, :top].tolist(), strict=True)
                ]

    run_hooked(model, input_ids[None], calls, look)
    return {name: found[name] for name in coders}


def encode_run(source: str, model_name: str | None, options: dict[str, Any]) -> None:
    """Encode as the command line asks, and print tables or JSON."""
    cfg: EncodeConfig = build(EncodeConfig, options)
    run: RunConfig = build(RunConfig, options)
    coders = load_coders(source, resolve_device(run.device), hookpoints=cfg.hookpoints)
    model_name = model_name or default_model(run_record(source), coders.values())
    for name, coder in () if cfg.force else coders.items():
        check_origin(name, coder, model_name)
    tokenizer = load_tokenizer(model_name, run)
    model = load_model(model_name, run)
    ids = document_start(tokenizer) + tokenizer(cfg.text, add_special_tokens=False)["input_ids"]
    if len(ids) > (most := context_length(run.ctx_len, tokenizer, model.config)):
        raise ArtifactError(f"text: expected at most {most} tokens, got {len(ids)}; shorten it or raise --ctx-len")
    latents = strongest_latents(coders, model, torch.tensor(ids, device=entry_device(model)), cfg.top)
    texts = token_texts(tokenizer, ids)
    if cfg.json:
        print(json.dumps(_record(model_name, ids, texts, latents), ensure_ascii=False))
        return
    for name, rows in latents.items():
        Console().print(_table(name, texts, rows))


def _record(model_name: str, ids: list[int], texts: list[str], latents: dict[str, list[list[Firing]]]) -> dict:
    return {
        "model": model_name,
        "tokens": [{"id": i, "text": text} for i, text in zip(ids, texts, strict=True)],
        "coders": {name: [[f._asdict() for f in row] for row in rows] for name, rows in latents.items()},
    }


def _table(name: str, texts: list[str], rows: list[list[Firing]]) -> Table:
    table = Table(title=name, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("token", no_wrap=True, max_width=24)
    table.add_column("latent activation, the strongest first")
    for text, row in zip(texts, rows, strict=True):
        shown = "   ".join(f"[bold]{f.latent}[/] {f.activation:.2f}" for f in row)
        table.add_row(_escaped(visible(text)), shown or "-")
    return table


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
