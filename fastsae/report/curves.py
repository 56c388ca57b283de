"""Drawings of a report: SVG in the page's own colours, so that they follow its light and dark schemes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

INK, LINE = "#010203", "#010204"
"""Stand-ins that the page's colours replace."""

_COLOURS = ("#3b82d6", "#d97706", "#1f9d6b", "#d1495b", "#8b5cf6", "#0e9aa7", "#b7791f", "#c2559d")
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fastsae", "font.size": 9, "axes.titlesize": 10,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


class Chart(NamedTuple):
    """A drawing with its title."""

    title: str
    svg: str


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a crash cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def training_charts(records: Sequence[dict[str, Any]], names: Sequence[str], auxk_alpha: float = 0) -> list[Chart]:
    """The loss, FVU, what else the run measured, dead latents and learning rate, over training tokens."""
    drawn = [
        ("FVU of each batch", "fvu", "fraction of variance unexplained"),
        ("AuxK loss", "auxk", "FVU of the residual"),
        ("Multi-TopK FVU", "multi_topk_fvu", "FVU with 4k latents"),
        ("Dead latents", "dead_pct", "%"),
    ]
    charts = []
    if loss := [(_x(record), _loss(record, names, auxk_alpha)) for record in records]:
        charts.append(Chart("Loss", _lines({"loss": loss}, "mean over coders")))
    for title, key, unit in drawn:
        series = {name: _series(records, f"{key}/{name}") for name in names}
        if series := {name: points for name, points in series.items() if points}:
            charts.append(Chart(title, _lines(series, unit)))
    if points := _series(records, "lr"):
        charts.append(Chart("Learning rate", _lines({"lr": points}, "", log=False)))
    return charts


def _loss(record: dict[str, Any], names: Sequence[str], auxk_alpha: float) -> float:
    """What was descended: FVU, the weighted AuxK loss and an eighth of the Multi-TopK FVU, averaged over coders."""
    if "loss" in record:
        return record["loss"]
    parts = {"fvu": 1.0, "auxk": auxk_alpha, "multi_topk_fvu": 1 / 8}
    total = sum(weight * record.get(f"{key}/{name}", 0.0) for name in names for key, weight in parts.items())
    return total / len(names)


def density_chart(edges: Sequence[float], counts: Sequence[int], dead: int) -> str:
    """How many latents fire how often: a histogram over log10 of the density."""
    with _figure() as (figure, axes):
        axes.stairs(counts, edges, fill=True, color=_COLOURS[0])
        first = next((i for i, count in enumerate(counts) if count), 0)
        axes.set_xlim(edges[first] - 0.25, 0)
        axes.set_xlabel(f"log10 of the share of tokens   ({dead:,} never fired)")
        axes.set_ylabel("latents")
        return _svg(figure)


def _series(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(_x(record), record[key]) for record in records if record.get(key) is not None]


def _x(record: dict[str, Any]) -> float:
    return record.get("tokens", record["step"])


def _lines(series: dict[str, list[tuple[float, float]]], unit: str, *, log: bool = True) -> str:
    """One curve per name; logarithmic where the values span a wide range."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    colours = (
        _COLOURS
        if len(series) <= len(_COLOURS)
        else [colormaps["plasma"](0.1 + 0.75 * i / (len(series) - 1)) for i in range(len(series))]
    )
    with _figure() as (figure, axes):
        for (name, points), colour in zip(series.items(), colours, strict=False):
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=colour,
                linewidth=1.6,
                marker="." if len(points) < 3 else None,
            )
        values = [value for points in series.values() for _, value in points]
        if log and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
        elif min(values) == max(values) == 0:
            axes.set_ylim(-0.03, 1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training tokens")
        axes.set_ylabel(unit)
        if len(series) > 1:
            axes.legend(ncols=1 + (len(series) > 6), loc="upper left", bbox_to_anchor=(0, -0.2), borderaxespad=0)
        return _svg(figure)


class _figure:
    """A small figure with the page's style, closed in the end; pyplot's global state is not touched."""

    def __enter__(self):
        import matplotlib
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        figure = Figure(figsize=(4.4, 2.7))
        return figure, figure.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)


def _svg(figure: Any) -> str:
    """The figure as an element to stand in a page: colours by name, no ids but those that are referred to."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--line)")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
