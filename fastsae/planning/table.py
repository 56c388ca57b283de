"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from .disk import Disk
from .result import Memory, Plan


def show(plan: Plan, console: Console) -> None:
    """Coders, memory, disk and tokens."""
    console.print(_heading(plan), highlight=False, soft_wrap=True)
    console.print(coder_table(plan))
    console.print(memory_table(plan.memory))
    if plan.modes:
        console.print(mode_table(plan))
    for line in (*_advice_lines(plan), *_disk_lines(plan.disk), *_token_lines(plan), *_speed_lines(plan)):
        console.print(line, highlight=False, soft_wrap=True)


def size(count: int) -> str:
    """Bytes in binary units, three digits or more: ``1.25 GiB``."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _heading(plan: Plan) -> str:
    on = f"{plan.ranks} x {plan.device} ({plan.mode})" if plan.ranks > 1 else plan.device
    return (
        f"{plan.model}: {plan.model_kind}, {plan.model_parameters:,} parameters in {plan.dtype}, "
        f"on {on}, implementation {plan.implementation}"
    )


def coder_table(plan: Plan) -> Table:
    """A row per coder: shapes and bytes, on however many ranks it lies."""
    table = Table(box=None, pad_edge=False)
    table.add_column("coder")
    for column in ("in", "out", "latents", "k", "parameters", "weights", "gradients", "optimizer"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in plan.coders:
        table.add_row(
            c.name, str(c.d_in), str(c.d_out), f"{c.num_latents:,}", str(c.k), f"{c.parameters:,}",
            size(c.kept.weights), size(c.kept.gradients), size(c.kept.optimizer),
        )  # fmt: skip
    if len(plan.coders) > 1:
        kept = [c.kept for c in plan.coders]
        table.add_section()
        table.add_row(
            f"{len(plan.coders)} coders", "", "", f"{sum(c.num_latents for c in plan.coders):,}", "",
            f"{sum(c.parameters for c in plan.coders):,}", size(sum(k.weights for k in kept)),
            size(sum(k.gradients for k in kept)), size(sum(k.optimizer for k in kept)),
        )  # fmt: skip
    return table


def memory_table(memory: Memory) -> Table:
    """What adds up to the peak on the device that holds the most."""
    table = Table("memory per device, at most", box=None, pad_edge=False, show_header=True)
    table.add_column("", justify="right", no_wrap=True)
    kept = memory.kept
    rows = [
        ("the model's weights", memory.model), ("coders' weights", kept.weights), ("their gradients", kept.gradients),
        ("optimizer states", kept.optimizer), ("narrow copies of the matrices", kept.copies),
        ("counters, buffers", kept.counters + memory.buffers),
        ("the model's activations at the peak", memory.activations), (f"work at the peak: {memory.when}", memory.step),
    ]  # fmt: skip
    for what, count in rows:
        if count:
            table.add_row(what, size(count))
    table.add_section()
    table.add_row("peak", size(memory.peak), style="bold")
    if memory.process:
        table.add_row("beside it, Python and its libraries", size(memory.process))
    if memory.available is None:
        table.add_row("there is", "unknown: --memory")
    else:
        verdict = "" if memory.fits else ": does not fit"
        table.add_row(f"there is{verdict}", size(memory.available), style="" if memory.fits else "bold red")
    return table


def mode_table(plan: Plan) -> Table:
    """The ways to spread the run over its ranks."""
    table = Table(f"on {plan.ranks} ranks", box=None, pad_edge=False)
    for column in ("peak per device", "over a link per step", "most work / mean"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for mode in plan.modes:
        said = "recommended" if mode.recommended else ""
        table.add_row(
            mode.options or "replicas (no option)", size(mode.peak), size(mode.link), f"{mode.load:.2f}",
            "does not fit" if mode.fits is False else said, style="bold" if mode.recommended else "",
        )  # fmt: skip
    return table


def _advice_lines(plan: Plan) -> Iterator[str]:
    advice, available = plan.advice, plan.memory.available
    if advice.micro_acc_steps is not None:
        yield f"micro-batch: {advice.micro_batch:,} tokens (--micro-acc-steps {advice.micro_acc_steps})"
    elif available is not None:
        yield (
            f"no micro-batch fits into {size(available)}; what does:"
            if advice.changes
            else (
                f"no micro-batch fits into {size(available)}, nor does any one change; lower --expansion-factor or "
                "--num-latents, or combine several"
            )
        )
        for change in advice.changes:
            yield f"  {change.what}: {size(change.peak)}"


def _speed_lines(plan: Plan) -> Iterator[str]:
    if plan.speed is None:
        yield "speed: unknown; --bench FILE works it out from what fastsae bench measured, --measure takes a few steps"
        return
    each = " per process, without what the links take" if plan.ranks > 1 else ""
    yield f"speed: about {plan.speed.tokens_per_second:,.0f} tokens/s{each} ({plan.speed.source})"
    if plan.seconds is not None:
        yield f"time: about {_duration(plan.seconds)}{'' if plan.tokens.exact else ' at most'}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _disk_lines(disk: Disk) -> Iterator[str]:
    yield (
        f"disk: {size(disk.coders)} of coders and {size(disk.state)} of training state per checkpoint; "
        f"{size(disk.running)} while it runs, {size(disk.saving)} while it saves, {size(disk.finished)} in the end"
    )


def _token_lines(plan: Plan) -> Iterator[str]:
    tokens = plan.tokens
    if tokens.sequences is None:
        yield (
            f"tokens: unknown before {plan.dataset} is read and tokenised, {tokens.per_sequence} per sequence; "
            "--max-tokens limits them"
        )
    else:
        yield (
            f"tokens: {'' if tokens.exact else 'at most '}{tokens.total:,} ({tokens.sequences:,} sequences of "
            f"{tokens.per_sequence}, {tokens.held_out} more held out), {tokens.steps:,} steps"
        )
