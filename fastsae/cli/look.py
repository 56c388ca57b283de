"""``fastsae eval``, ``encode``, ``report``: coders on a model's activations."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from rich.console import Console

from ..options import with_options
from .app import OPTIONS, app, show_notes


@app.command(name="eval")
@with_options(*OPTIONS["eval"])
def evaluate(
    coders: Annotated[str, typer.Argument(help="A run's folder, one coder's folder, or a hub id.")],
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; by default the run's.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Argument(help="Other data than what the run held out of its own.", show_default=False),
    ] = None,
    **options: Any,
) -> None:
    """Measure coders: variance explained, sparsity, and the model's loss with them grafted in.

    [bold]fastsae eval checkpoints/my-run gpt2[/]
    """
    from ..eval.run import eval_run

    show_notes()
    eval_run(coders, model, dataset, options)


@app.command()
@with_options(*OPTIONS["encode"])
def encode(
    coders: Annotated[str, typer.Argument(help="A run's folder, one coder's folder, or a hub id.")],
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; by default the run's.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Show the strongest latents at every token of a text.

    [bold]fastsae encode checkpoints/my-run gpt2 --text "The cat sat"[/]
    """
    from ..encode import encode_run

    show_notes(logging.WARNING)
    encode_run(coders, model, options)


@app.command()
@with_options(*OPTIONS["report"])
def report(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; by default the run's.", show_default=False)
    ] = None,
    dataset: Annotated[str | None, typer.Argument(help="Other data than the run's own.", show_default=False)] = None,
    **options: Any,
) -> None:
    """Write a run as one HTML file: curves, densities, and what its latents fire on.

    [bold]fastsae report checkpoints/my-run[/]
    """
    from ..report.run import report_run

    show_notes()
    path = report_run(run, model, dataset, options)
    Console().print(f"report: {path}", highlight=False, soft_wrap=True)
