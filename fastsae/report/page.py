"""The page itself: one HTML file with its style, its script, its drawings and its data inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..version import __version__
from .curves import Chart


def render_page(
    *,
    title: str,
    facts: dict[str, str],
    coders: list[dict[str, Any]],
    charts: list[Chart],
    densities: list[Chart],
    latents: dict[str, list[dict[str, Any]]],
    words: Callable[[list[int]], list[str]],
) -> str:
    """HTML that needs nothing else.

    ``coders`` are the rows of an evaluation (eval.json's), ``latents`` the records of each coder by its name, whose
    token ids ``words`` turns into text.
    """
    environment = Environment(
        loader=PackageLoader("fastsae.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    ids = sorted({i for records in latents.values() for record in records for i in _ids_of(record)})
    return environment.get_template("page.html").render(
        title=title, facts=facts, coders=coders, charts=charts, densities=densities, version=__version__,
        data={"words": dict(zip(ids, words(ids), strict=True)), "coders": latents},
        losses=any(coder["cross_entropy"] for coder in coders),
    )  # fmt: skip


def write_page(path: Path, html: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(html, encoding="utf-8")
    beside.replace(path)


def _ids_of(record: dict[str, Any]) -> Iterable[int]:
    for context in record["contexts"]:
        yield from context["tokens"]
    for side in ("up", "down"):
        yield from (i for i, _ in record[side] or ())
