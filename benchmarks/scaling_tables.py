"""README's tables of several devices: measured scaling on CPU ranks, and modelled bytes over links of GPUs.

The model's assumptions stand in the text that it makes. A coder's time is the one measured on one GPU (README's
Numbers); nothing here was measured on several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from table import write_between

from fastsae import SaeConfig, TrainConfig
from fastsae.coders import coder_specs
from fastsae.hookpoints import Hookpoint
from fastsae.planning.kept import Kept
from fastsae.planning.layout import layout
from fastsae.planning.memory import Situation
from fastsae.planning.modes import load, traffic
from fastsae.planning.structure import Forward, Structure
from fastsae.planning.work import Work


class Shape(NamedTuple):
    """A run: N tokens on each rank, and what it trains."""

    N: int
    D: int
    L: int
    k: int
    coders: int
    milliseconds: float
    """One coder's step on one H200."""


SHAPES = {
    "S1, GPT-2's 12 layers": Shape(8192, 768, 24576, 32, 12, 1.9),
    "S2, 32 layers of width 4096": Shape(8192, 4096, 131072, 64, 32, 25.7),
    "S3, 24 layers of width 2048": Shape(16384, 2048, 65536, 64, 24, 13.4),
}
LINKS = {8: ("8 GPUs", 450), 16: ("2 nodes of 8", 50), 32: ("4 nodes of 8", 50)}
"""GPUs, where, and GB/s that leave one of them: NVLink in a node, between nodes a card of 400 Gbit/s for each."""
WAYS = {
    "replicas": {},
    "--distribute-modules": {"distribute_modules": True},
    "--distribute-latents 8": {"distribute_latents": 8},
}


def tables(record: dict[str, Any], name: str, page: Path | None) -> None:
    """Print both, or put them between README's comments."""
    for mark, lines in (("scaling", measured(record, name)), ("links", modelled())):
        text = "\n".join(lines)
        if page is None:
            print(text, end="\n\n")
        else:
            write_between(page, mark, text)


def measured(record: dict[str, Any], name: str) -> Iterator[str]:
    """Tokens per second by mode and number of ranks."""
    e, s = record["environment"], record["setting"]
    ranks = sorted({int(count) for by_ranks in record["seconds"].values() for count in by_ranks})
    steps = min(len(times) for by_ranks in record["seconds"].values() for times in by_ranks.values())
    yield "| | " + " | ".join(f"{count} rank{'s' * (count > 1)}, tokens/s" for count in ranks) + " | faster | sent |"
    yield "|---|" + "---|" * (len(ranks) + 2)
    for mode, by_ranks in record["seconds"].items():
        step = {count: median(by_ranks[str(count)]) for count in ranks}
        rates = " | ".join(f"{s['tokens'] / step[count]:,.0f}" for count in ranks)
        sent = record["sent"][mode][str(ranks[-1])] / 2**20
        yield f"| {mode} | {rates} | {step[ranks[0]] / step[ranks[-1]]:.2f} x | {sent:.0f} MiB |"
    yield ""
    yield (
        f"Coders at the six `{s['hookpoints']}` of the embedded model (L={s['latents']}), {s['tokens']} tokens in a "
        f"step of all ranks, Adam, gloo, one thread of an {e['cpu']} per rank, median of {steps} steps; sent: what a "
        f"rank gives to operations in a step. `benchmarks/results/{name}`, {e['date']}, commit {e['commit'][:7]}."
    )


def modelled() -> Iterator[str]:
    """Bytes that leave a GPU in a step, their time at its link's rate, and the time of the step's own work."""
    yield "| a run's coders | | keeps | " + " | ".join(where for where, _ in LINKS.values()) + " |"
    yield "|---|---|---|" + "---|" * len(LINKS)
    for label, shape in SHAPES.items():
        for way, options in WAYS.items():
            kept = coders_bytes(situation(shape, 8, options))
            cells = [cell(shape, ranks, rate, options) for ranks, (_, rate) in LINKS.items()]
            yield f"| {label} | {way} | {size(kept)} | " + " | ".join(cells) + " |"
            label = ""
    inside, between = LINKS[8][1], LINKS[16][1]
    yield ""
    yield (
        "A model, not a measurement. Keeps: a GPU's coders and their optimizer, on 8 of them (an H200 has 141 GB: S2's "
        "replicas fit on none). Then bytes that leave "
        "a GPU in an optimizer step by `fastsae plan`'s formulas, with 8192 (S3: 16384) tokens on each, bfloat16 "
        "activations, float32 gradients (`--grad-reduce-dtype bfloat16` halves what replicas send), sums in rings, "
        f"every latent active somewhere; their time at {inside} GB/s in a node and {between} between nodes, were "
        "nothing of it hidden behind work; and after the stroke the work of the rank that has the most: its coders' "
        "steps as one H200 took for them (above), in proportion to tokens. Latents are split inside of a node, and "
        "nodes are replicas: their gradients alone go at the slower rate, of the other ways all bytes do, as if no "
        "GPU's partners were in its own node. Replicas and split latents send in proportion to the number of coders; "
        "a single coder has one owner, whom `--distribute-modules` leaves with all of the work."
    )


def cell(shape: Shape, ranks: int, rate: float, options: dict[str, Any]) -> str:
    s, group = situation(shape, ranks, options), options.get("distribute_latents", ranks)
    found, inside = traffic(s), LINKS[8][1] if group < ranks else rate
    within, across = found.within(group), found.across(ranks // group)
    work = shape.coders * shape.milliseconds * load(s)
    return f"{size(within + across)}: {number(within / inside / 1e6 + across / rate / 1e6)} / {number(work)} ms"


def coders_bytes(s: Situation) -> int:
    """On the rank that holds the most."""
    return sum((s.coder_bytes(name, latents) for name, latents in s.layout.heaviest.items()), Kept()).total


def situation(shape: Shape, ranks: int, options: dict[str, Any]) -> Situation:
    """A run on so many GPUs."""
    N, D, L, k, coders, _ = shape
    hookpoints = {f"layers.{i}": Hookpoint(f"layers.{i}", "Layer", D, D, 1) for i in range(coders)}
    cfg = TrainConfig(SaeConfig(num_latents=L, k=k), batch_size=N, **options)
    specs = coder_specs(cfg, hookpoints)
    structure = Structure("model", 0, 0, hookpoints, Forward({}, (0, 0), 0))
    work = Work("triton", torch.bfloat16, cfg)
    return Situation(cfg, structure, specs, layout(cfg, specs, ranks), work, 1, 0, on_gpu=True)


def size(count: float) -> str:
    return (
        f"{count / 1e9:,.0f} GB"
        if count >= 1e10
        else f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:,.0f} MB"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
