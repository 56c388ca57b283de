"""An evaluation on the terminal: a table of coders, one of losses, in 80 columns."""

from __future__ import annotations

import math

from rich.table import Table

from .estimate import Estimate
from .result import CrossEntropy, Evaluation


def reconstruction_table(evaluation: Evaluation) -> Table:
    """One row per coder: what it does on its own."""
    table = _table("coder", ("FVU", "expl. var", "L0", "dead %", "dense %", "max cos"))
    table.caption = (
        f"{evaluation.tokens:,} tokens, {evaluation.sequences} sequences; ± is a 95 % interval over sequences. "
        "dead: never fired here; max cos: mean over latents of the largest cosine with another decoder row"
    )
    several = _several(evaluation)
    for row in evaluation.coders:
        r, latents = row.reconstruction, row.reconstruction.density.latents
        table.add_row(
            _name(row.coders, row.name, several), _interval(r.fvu), f"{1 - r.fvu.value:.3f}", f"{r.l0.value:.1f}",
            f"{100 * r.density.dead / latents:.1f}", f"{100 * r.density.dense / latents:.1f}",
            f"{row.decoder.mean:.2f}",
        )  # fmt: skip
    return table


def loss_table(evaluation: Evaluation) -> Table | None:
    """One row per coder grafted into the model alone, one per folder for all of its coders at once."""
    rows = [(_name(r.coders, r.name, _several(evaluation)), r.cross_entropy) for r in evaluation.coders]
    rows += [
        (_name(r.coders, f"all {len(r.names)} together{_seed(r.names)}", _several(evaluation)), r.cross_entropy)
        for r in evaluation.together
    ]
    measured = [(name, loss) for name, loss in rows if loss is not None]
    if not measured:
        return None
    table = _table("grafted in", ("CE", "CE - clean", "zeros", "mean", "recovered", "KL"))
    table.caption = (
        f"clean CE {measured[0][1].clean.value:.4f} nats per token. zeros, mean: CE with the module's output so "
        "replaced; recovered: (zeros - CE) / (zeros - clean)"
    )
    for name, loss in measured:
        table.add_row(name, *_losses(loss))
    return table


def _losses(loss: CrossEntropy) -> tuple[str, ...]:
    return (
        f"{loss.grafted.value:.3f}", f"{loss.grafted.value - loss.clean.value:+.4f}", f"{loss.zero.value:.3f}",
        f"{loss.mean.value:.3f}", _interval(loss.recovered), f"{loss.kl.value:.4f}",
    )  # fmt: skip


def _table(first: str, columns: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, caption_justify="left", padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _several(evaluation: Evaluation) -> bool:
    return len({row.coders for row in evaluation.coders}) > 1


def _name(source: str, name: str, several: bool) -> str:
    return f"{source}: {name}" if several else name


def _seed(names: tuple[str, ...]) -> str:
    seed = names[0].partition("/")[2]
    return f" ({seed})" if seed else ""


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.margin):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ±{estimate.margin:.3f}"
