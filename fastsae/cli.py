"""The ``fastsae`` command: parses and delegates."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from .activation_cache.config import CacheConfig
from .bench.shapes import BenchConfig
from .compat.sparsify_flags import translate
from .config import EncodeConfig, SaeConfig, TrainConfig
from .errors import FastsaeError
from .eval.config import EvalConfig
from .interrupt import Interrupted
from .options import build, normalise, with_options
from .report.config import ReportConfig
from .run_config import RunConfig
from .run_file import read_run_file
from .version import __version__

app = typer.Typer(
    name="fastsae",
    help="Train TopK sparse autoencoders and transcoders on Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
CONFIGS = (SaeConfig, TrainConfig, RunConfig)
OPTIONS = {
    "train": CONFIGS,
    "hookpoints": (RunConfig,),
    "bench": (BenchConfig,),
    "eval": (EvalConfig, RunConfig),
    "encode": (EncodeConfig, RunConfig),
    "report": (ReportConfig, RunConfig),
    "cache": (CacheConfig, RunConfig),
}
"""The configs behind each command's options."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    arguments = translate(sys.argv[1:] if arguments is None else arguments)
    arguments = normalise(arguments, OPTIONS.get(arguments[0], ()) if arguments else ())
    try:
        app(arguments)
    except FastsaeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
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
    _show_progress_notes()  # transformers and datasets load from here on, not for --help
    try:
        if resume is not None:
            from .resume_run import resume_run

            resume_run(resume, {**options, **named, **({} if config is None else {"config": config})})
        else:
            from .run import train_run

            given = {**({} if config is None else read_run_file(config, CONFIGS)), **options}
            train_run({**given, **named})
    except Interrupted as stop:  # here, for typer has its own way with KeyboardInterrupt
        Console(stderr=True).print(_escape(str(stop)), soft_wrap=True, highlight=False)
        raise typer.Exit(128 + stop.signum) from None


@app.command()
@with_options(RunConfig)
def hookpoints(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model; demo ships with fastsae.")] = "demo",
    **options: Any,
) -> None:
    """List the modules of a model that a coder can sit on: names, types, widths."""
    from .hooks import probe
    from .model import load_model

    _show_progress_notes(logging.WARNING)
    base = load_model(model, build(RunConfig, options))
    names = [name for name, _ in base.base_model.named_modules() if name]
    table = Table("hookpoint", "module", box=None, pad_edge=False)
    table.add_column("in", justify="right")
    table.add_column("out", justify="right")
    for at in probe(base, names).values():
        table.add_row(at.name, at.module, "-" if at.d_in is None else str(at.d_in), str(at.d_out))
    Console().print(table)


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
    from .eval.run import eval_run

    _show_progress_notes()
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
    from .encode import encode_run

    _show_progress_notes(logging.WARNING)
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
    from .report.run import report_run

    _show_progress_notes()
    path = report_run(run, model, dataset, options)
    Console().print(f"report: {path}", highlight=False, soft_wrap=True)


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
    from .activation_cache.run import cache_run

    _show_progress_notes()
    cache_run(model, dataset, options)


@app.command()
@with_options(BenchConfig)
def bench(**options: Any) -> None:
    """Measure the kernels on this machine, beside plain torch and the device's own peaks.

    Checks every result against float64 first; exits with 1, and prints no speed, where one differs.
    """
    from .bench.run import bench

    raise typer.Exit(bench(build(BenchConfig, options)))


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
    from .compat.convert import convert

    names, lost = convert(source, folder, to, hookpoint=hookpoint, force=force)
    console = Console(soft_wrap=True, highlight=False)
    for reason in lost:
        console.print(f"[yellow]lost:[/] {_escape(reason)}")
    console.print(f"{len(names)} {'coder' if len(names) == 1 else 'coders'} written to {_escape(folder)} as {to}")


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="Folder, file or hub repository with coders of any known format.")],
) -> None:
    """Show what coders are: format, shapes, dtype, hookpoint, model, provenance."""
    from .compat.info import info_table

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
    from .push import CARD, planned_files, size, text, upload

    planned = planned_files(Path(folder), repo)
    console = Console(soft_wrap=True, highlight=False)
    for name, content in planned.items():
        console.print(f"{size(content):>15,} bytes  {_escape(name)}")
    if dry_run:
        console.print(f"\n{_escape(text(planned[CARD]))}")
        console.print(f"dry run: nothing was sent to {_escape(repo)}; send it with --no-dry-run")
    else:
        console.print(f"sent to {_escape(upload(planned, repo, private=private, token=hf_token))}")


def _show_progress_notes(level: int = logging.INFO) -> None:
    """One-line notes on stderr; the libraries below keep their warnings to themselves."""
    notes = logging.getLogger("fastsae")
    notes.setLevel(level)
    if not notes.handlers:
        console = Console(stderr=True)
        notes.addHandler(RichHandler(console=console, show_time=False, show_path=False, show_level=False))
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading weights; downloads keep theirs
    transformers_logging.set_verbosity_error()  # the base model leaves the LM head out, on purpose


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
