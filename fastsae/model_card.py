"""The page of a hub repository with coders: what they are, how good they are, how to load them."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from .compat.coder import Coder
from .compat.info import describe, provenance
from .hub import looks_local
from .version import __version__


def model_card(
    repo: str, coders: dict[str, Coder], formats: set[str], run: dict[str, Any], evaluation: dict[str, Any]
) -> str:
    """Markdown with the hub's header; ``run`` is the run's config.json, ``evaluation`` its eval.json, or empty.

    Names that can only be paths of the author's machine are left out.
    """
    model = _public(next((coder.model for coder in coders.values() if coder.model), None) or run.get("model"))
    dataset = _public(run.get("dataset"))
    header = ModelCardData(
        library_name="fastsae",
        tags=["sparse-autoencoder", "interpretability", *sorted(formats)],
        base_model=model,
        datasets=[dataset] if dataset else None,
    )
    transcoders = all(coder.transcode for coder in coders.values())
    what = "Transcoders" if transcoders else "Sparse autoencoders"
    trained = (f" trained on the activations of `{model}`" if model else "") + (f" over `{dataset}`" if dataset else "")
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {repo.rpartition('/')[2]}\n\n{what}{trained}, in the format of {' and '.join(sorted(formats))}.",
        _table(coders),
        *_quality(evaluation),
        _usage(repo, coders, formats),
        f"Written by fastsae {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(coders: dict[str, Coder]) -> str:
    rows = ["| coder | hookpoint | kind | width | latents | trained by |", "|---|---|---|---|---|---|"]
    for name, coder in coders.items():
        width = str(coder.d_in) if coder.d_in == coder.d_out else f"{coder.d_in} → {coder.d_out}"
        place = coder.hookpoint or coder.hook_name or "-"
        cells = [name or "(root)", place, describe(coder), width, f"{coder.num_latents:,}", provenance(coder) or "-"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _quality(evaluation: dict[str, Any]) -> list[str]:
    """The numbers of an eval.json, as far as it has them; nothing is said about what was not measured."""
    rows = []
    for coder in evaluation.get("coders") or []:
        alone, losses = coder.get("reconstruction") or {}, coder.get("cross_entropy") or {}
        density = alone.get("density") or {}
        dead = f"{density['dead']:,} of {density['latents']:,}" if "dead" in density and "latents" in density else "-"
        cells = [_number(alone.get("fvu")), _number(alone.get("l0"), 1), dead, _number(losses.get("recovered"))]
        rows.append(f"| {' | '.join([str(coder.get('name') or '(root)'), *cells])} |")
    if not rows:
        return []
    on = f" on {evaluation['dataset']}" if evaluation.get("dataset") else ""
    about = f"{evaluation.get('tokens') or 0:,} tokens{on}, by `fastsae eval`; in brackets: 95 % intervals."
    head = ["| coder | FVU | L0 | dead latents | loss recovered |", "|---|---|---|---|---|"]
    return ["## Evaluation", about, "\n".join([*head, *rows])]


def _usage(repo: str, coders: dict[str, Coder], formats: set[str]) -> str:
    first = next(iter(coders))
    place = f', "{first}"' if first else ""
    if formats == {"sparsify"}:
        code = f'from fastsae import FastSae\n\nsae = FastSae.load_from_hub("{repo}"{place})'
        code += "\nacts, indices, _ = sae.encode(x)  # x [..., width]: activations of the hookpoint"
    else:
        code = f'from fastsae.compat.convert import load\n\ncoder = load("{repo}"{place})\nacts = coder.encode(x)'
    return f"## Use\n\n```python\n{code}\n```"


def _number(estimate: Any, digits: int = 4) -> str:
    if not isinstance(estimate, dict) or estimate.get("value") is None:
        return "-"
    interval = [estimate.get("low"), estimate.get("high")]
    between = "" if None in interval else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{estimate['value']:.{digits}f}{between}"


def _public(name: Any) -> str | None:
    return name if isinstance(name, str) and name and not looks_local(name) and name != "demo" else None
