"""``fastsae info``: what the coders in a folder, file or hub repository are."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from . import convert
from .coder import Coder


def info_table(source: Path | str) -> Table:
    """One row per coder: format, activation, shapes, dtype, hookpoint, model and where it comes from."""
    root = convert.locate(source)
    found, table = convert.find(root), Table(box=None, pad_edge=False)
    for column in ("coder", "format", "kind", "width", "latents", "dtype", "hookpoint", "model", "from"):
        table.add_column(column, overflow="fold", justify="right" if column in ("width", "latents") else "left")
    for name, coder in convert.load_all(root, rename=False).items():
        width = str(coder.d_in) if coder.d_in == coder.d_out else f"{coder.d_in} → {coder.d_out}"
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in coder.tensors().values()})
        table.add_row(
            name or root.name, found[name].format, describe(coder), width, f"{coder.num_latents:,}", ", ".join(dtypes),
            coder.hookpoint or coder.hook_name or "-", coder.model or "-", provenance(coder) or "-",
        )  # fmt: skip
    return table


def describe(coder: Coder) -> str:
    """``topk k=32 transcoder, skip``; one threshold of all latents beside a k is what BatchTopK learns."""
    shared = coder.k is not None and coder.threshold is not None and bool((coder.threshold == coder.threshold[0]).all())
    words = ["batchtopk" if shared else coder.activation, *([] if coder.k is None else [f"k={coder.k}"])]
    words += ["transcoder"] if coder.transcode else []
    extras = ["skip"] * (coder.W_skip is not None) + ["layer norm"] * coder.layer_norm
    return ", ".join([" ".join(words), *extras])


def provenance(coder: Coder) -> str:
    """Who made it, and on how many tokens, as far as the file says."""
    notes = coder.notes
    saelens = (notes.get("saelens") or {}).get("metadata") or {}
    made_by = f"fastsae {notes['version']}" if "version" in notes else None
    if version := saelens.get("sae_lens_training_version") or saelens.get("sae_lens_version"):
        made_by = saelens.get("converted_by") or f"SAELens {version}"
    if trainer := (notes.get("dictionary_learning") or {}).get("trainer_class"):
        made_by = f"dictionary_learning {trainer}"
    tokens = f"{notes['tokens']:,} tokens" if isinstance(notes.get("tokens"), int) else None
    return ", ".join(word for word in (made_by, tokens) if word)
