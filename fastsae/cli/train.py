"""``fastsae train``, ``hookpoints``, ``cache``, ``bench``: what trains, and what is looked at before."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..bench.shapes import BenchConfig
from ..interrupt import Interrupted
from ..options import build, with_options
from ..run_config import RunConfig
from ..run_file import read_run_file
from .app import CONFIGS, OPTIONS, app, escape, is_first, show_notes


@app.command()
@with_options(*CONFIGS)
def train(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id or folder of a model; by default demo, which ships along.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder or file (parquet, jsonl, json, csv, arrow, txt, bin).", show_default=False),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="File with options (YAML, or a run's config.json); the command line's win.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Folder of a run to go on with, from where it was last saved.", metavar="RUN", show_default=False
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train sparse coders on a model's activations.

    Without arguments: a small model that ships with fastsae, on the Python standard library's sources.

    [bold]fastsae train gpt2 --hookpoints "h.*.mlp.act"[/]
    """
    named = {name: value for name, value in (("model", model), ("dataset", dataset)) if value is not None}
    show_notes()  # transformers and datasets load from here on, not for --help
    try:
        if resume is not None:
            from ..resume_run import resume_run

            resume_run(resume, {**options, **named, **({} if config is None else {"config": config})})
        else:
            from ..run import train_run

            given = {**({} if config is None else read_run_file(config, CONFIGS)), **options}
            train_run({**given, **named})
    except Interrupted as stop:  # here, for typer has its own way with KeyboardInterrupt
        if is_first():
            Console(stderr=True).print(escape(str(stop)), soft_wrap=True, highlight=False)
        raise typer.Exit(128 + stop.signum) from None


@app.command()
@with_options(RunConfig)
def hookpoints(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model; demo ships with fastsae.")] = "demo",
    **options: Any,
) -> None:
    """List the modules of a model that a coder can sit on: names, types, widths."""
    from ..hookpoints import probe
    from ..model import load_model

    show_notes(logging.WARNING)
    base = load_model(model, build(RunConfig, options))
    names = [name for name, _ in base.base_model.named_modules() if name]
    table = Table("hookpoint", "module", box=None, pad_edge=False)
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    for at in probe(base, names).values():
        table.add_row(at.name, at.module, "-" if at.d_in is None else str(at.d_in), str(at.d_out))
    Console().print(table)


@app.command()
@with_options(*OPTIONS["cache"])
def cache(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model; demo ships with fastsae.")] = "demo",
    dataset: Annotated[
        str | None, typer.Argument(help="Hub id, folder or file, as for train.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Write a model's activations to disk, after saying how large they will be; run again, it goes on or verifies.

    [bold]fastsae cache gpt2 ./tokens --hookpoints "h.*.mlp" --output acts[/]
    """
    from ..activation_cache.run import cache_run

    show_notes()
    cache_run(model, dataset, options)


@app.command()
@with_options(BenchConfig)
def bench(**options: Any) -> None:
    """Measure the kernels on this machine, beside plain torch and the device's own peaks.

    Checks every result against float64 first; exits with 1, and prints no speed, where one differs.
    """
    from ..bench.run import bench

    raise typer.Exit(bench(build(BenchConfig, options)))
