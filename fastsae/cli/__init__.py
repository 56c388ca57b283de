"""The ``fastsae`` command: parses and delegates."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from ..arguments import normalise
from ..compat.sparsify_flags import translate
from ..errors import FastsaeError
from ..version import __version__
from .app import CONFIGS, OPTIONS, app, escape, speaker

# isort: off
from . import train, plan, look, convert  # noqa: F401  (commands register themselves, in the order of --help)
# isort: on

__all__ = ["CONFIGS", "OPTIONS", "app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    arguments = translate(sys.argv[1:] if arguments is None else arguments)
    arguments = normalise(arguments, OPTIONS.get(arguments[0], ()) if arguments else ())
    try:
        app(arguments)
    except FastsaeError as error:
        Console(stderr=True).print(
            f"{speaker()}[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"fastsae {__version__}")
        raise typer.Exit
