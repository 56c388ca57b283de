"""README's drawing of a step's time beside the other libraries, as SVG, of the same raw results as the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLOURS = {"fastsae": "#3b82d6", "fastsae-graph": "#3b82d6"}
OTHERS = "#9aa4b2"
INK = "#7d8590"  # legible on light and dark pages
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fastsae", "font.family": "sans-serif", "font.size": 9,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Write the chart: a panel for each case of each record, its bars in times of fastsae's."""
    panels = [(record, case) for record in records for case in record["cases"].values()]
    bars = [len(case["results"]) for _, case in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.17 * sum(bars) + 0.38 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in bars])
        for (record, case), at in zip(panels, axes[:, 0], strict=True):
            panel(at, case["results"])
            at.set_title(label(record, case), loc="left", fontsize=9)
        axes[-1, 0].set_xlabel("time of one training step, fastsae's = 1")
        metadata = {"Date": None, "Creator": None, "Title": "A training step beside other libraries"}
        figure.savefig(path, format="svg", transparent=True, metadata=metadata)


def panel(at: Any, results: dict[str, dict[str, Any]]) -> None:
    """One case: a bar for each library, with its milliseconds."""
    own = results["fastsae"]["median_ms"]
    for name, result in results.items():
        times = result["median_ms"] / own
        at.barh(name, times, color=COLOURS.get(name, OTHERS), height=0.75)
        figures = f"{times:.1f} × ({result['median_ms']:,.0f} ms)"
        at.annotate(figures, (times, name), (4, 0), textcoords="offset points", va="center", fontsize=8)
    at.invert_yaxis()
    at.tick_params(left=False, bottom=False, labelbottom=False)
    at.spines["bottom"].set_visible(False)
    at.margins(x=0.2)


def label(record: dict[str, Any], case: dict[str, Any]) -> str:
    """The device and the shape of a case."""
    s, device = case["setting"], machine(record["environment"]).replace("(R)", "")
    where = f", {case['hookpoint']}" if case["hookpoint"] else ""
    return f"{device}: {s['N']} tokens, D = {s['D']}, L = {s['L']}, k = {s['k']}{where}"


def machine(environment: dict[str, Any]) -> str:
    """What a record was made on, in words."""
    return environment["gpu"] or f"{environment['threads']} threads of an {environment['cpu']}"
