"""The ``fastsae`` command's frame: the app that commands register with, their options, what goes to the terminal."""

from __future__ import annotations

import logging
import os
import warnings

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..activation_cache.config import CacheConfig
from ..bench.shapes import BenchConfig
from ..coder_config import SaeConfig
from ..config import TrainConfig
from ..encode_config import EncodeConfig
from ..eval.config import EvalConfig
from ..planning.config import PlanConfig
from ..report.config import ReportConfig
from ..run_config import RunConfig

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
    "plan": (PlanConfig, *CONFIGS),
}
"""The configs behind each command's options."""


def show_notes(level: int = logging.INFO) -> None:
    """One-line notes on stderr; the libraries below keep their warnings to themselves."""
    notes = logging.getLogger("fastsae")
    notes.setLevel(level if is_first() else logging.ERROR)  # rank 0 says it for all
    if not notes.handlers:
        console = Console(stderr=True)
        notes.addHandler(RichHandler(console=console, show_time=False, show_path=False, show_level=False))
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading weights; downloads keep theirs
    transformers_logging.set_verbosity_error()  # the base model leaves the LM head out, on purpose


def is_first() -> bool:
    """Whether this process speaks for the others that torchrun started; before it has joined them."""
    return os.environ.get("RANK", "0") == "0"


def speaker() -> str:
    """Which of several processes an error is of."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def escape(text: str) -> str:
    """``text`` with nothing in it taken for markup."""
    return text.replace("[", r"\[")
