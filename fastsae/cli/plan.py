"""``fastsae plan``: what a run would need and take."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from ..options import with_options
from ..run_file import read_run_file
from .app import CONFIGS, OPTIONS, app, show_notes


@app.command()
@with_options(*OPTIONS["plan"])
def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id or folder of a model; its config.json is enough.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Argument(help="Hub id, folder or file, as for train.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="File with options (YAML, or a run's config.json); the command line's win.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Say what fastsae train with the same options would need and take: no weights are loaded, nothing is trained.

    [bold]fastsae plan gpt2 --hookpoints "h.*.mlp.act" --max-tokens 100000000[/]
    """
    from ..planning.run import plan_run

    show_notes(logging.WARNING if options.get("json") else logging.INFO)
    named = {name: value for name, value in (("model", model), ("dataset", dataset)) if value is not None}
    given = {} if config is None else read_run_file(config, CONFIGS)
    plan_run({**given, **options, **named})
