"""What a run shows on the terminal: a bar while it works, a table when it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True)


@dataclass(frozen=True)
class CoderSummary:
    """How one coder ended."""

    name: str
    fvu: float
    """Fraction of variance unexplained on held-out sequences."""
    l0: float
    """Mean number of active latents per held-out token."""
    dead_pct: float
    """Latents that were silent over the last ``dead_window`` training tokens, in percent."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Time spent on this coder's forward and backward, the optimizer and the model left out."""


@dataclass(frozen=True)
class RunSummary:
    """What :meth:`fastsae.Trainer.fit` returns."""

    folder: Path
    coders: tuple[CoderSummary, ...]
    seconds: float
    dead_window: int


class TrainProgress:
    """A progress bar with steps, tokens/s, time left and FVU; silent where ``enabled`` is False."""

    def __init__(self, total_steps: int, enabled: bool):
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[fvu]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        self._task = self._bar.add_task("training", total=total_steps, rate="", fvu="")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)

    def show(self, tokens_per_second: float, fvu: float) -> None:
        self._bar.update(self._task, rate=f"{tokens_per_second:,.0f} tokens/s", fvu=f"FVU {fvu:.3f}")


def summary_table(summary: RunSummary) -> Table:
    """One row per coder."""
    table = Table(
        caption=f"{summary.seconds:.0f} s in all; dead: silent over the last {summary.dead_window:,} tokens",
        caption_justify="left",
    )
    table.add_column("hookpoint")
    for column in ("held-out FVU", "L0", "dead %", "tokens", "seconds"):
        table.add_column(column, justify="right")
    for coder in summary.coders:
        fvu = "-" if math.isnan(coder.fvu) else f"{coder.fvu:.4f}"
        l0 = "-" if math.isnan(coder.l0) else f"{coder.l0:.1f}"
        table.add_row(coder.name, fvu, l0, f"{coder.dead_pct:.1f}", f"{coder.tokens:,}", f"{coder.seconds:.1f}")
    return table
