"""``fastsae convert``, ``info``, ``push``: coders as files, in any library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app, escape


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder, file or hub repository with coders of any known format.")],
    folder: Annotated[str, typer.Argument(help="New folder to write.")],
    to: Annotated[
        str, typer.Option(help="sparsify, saelens, dictionary_learning, openai or circuit_tracer.", metavar="FORMAT")
    ],
    hookpoint: Annotated[str | None, typer.Option(help="Only the coder of this name.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it even where something is lost.")] = False,
) -> None:
    """Convert coders from one library's format to another's; the input's format is found out.

    [bold]fastsae convert checkpoints/run ./for-saelens --to saelens[/]
    """
    from ..compat.convert import convert

    names, lost = convert(source, folder, to, hookpoint=hookpoint, force=force)
    console = Console(soft_wrap=True, highlight=False)
    for reason in lost:
        console.print(f"[yellow]lost:[/] {escape(reason)}")
    console.print(f"{len(names)} {'coder' if len(names) == 1 else 'coders'} written to {escape(folder)} as {to}")


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="Folder, file or hub repository with coders of any known format.")],
) -> None:
    """Show what coders are: format, shapes, dtype, hookpoint, model, provenance."""
    from ..compat.info import info_table

    Console().print(info_table(source))


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="Folder with coders of any known format.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, org/name; made if it does not exist.")],
    dry_run: Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Only show what would go.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    hf_token: Annotated[str | None, typer.Option(help="Hub access token.", show_default=False)] = None,
) -> None:
    """Publish coders on the Hugging Face hub, with a model card made from their files and eval.json.

    [bold]fastsae push checkpoints/run org/name --no-dry-run[/]
    """
    from ..push import CARD, planned_files, size, text, upload

    planned = planned_files(Path(folder), repo)
    console = Console(soft_wrap=True, highlight=False)
    for name, content in planned.items():
        console.print(f"{size(content):>15,} bytes  {escape(name)}")
    if dry_run:
        console.print(f"\n{escape(text(planned[CARD]))}")
        console.print(f"dry run: nothing was sent to {escape(repo)}; send it with --no-dry-run")
    else:
        console.print(f"sent to {escape(upload(planned, repo, private=private, token=hf_token))}")
