"""What ``fastsae eval`` does: coders, model and held-out data from their names, an evaluation, its tables."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from ..devices import resolve_device
from ..errors import ConfigError
from ..model import is_causal, load_config, load_language_model, load_model, load_tokenizer
from ..options import build
from ..run_config import RunConfig
from ..saved import check_origin, default_model, load_coders, run_record
from ..tokens import with_excluded_ids
from .config import EvalConfig
from .evaluate import evaluate
from .result import Evaluation
from .table import loss_table, reconstruction_table
from .tokens import evaluation_tokens

logger = logging.getLogger("fastsae")


def eval_run(source: str, model_name: str | None, dataset: str | None, options: dict[str, Any]) -> Evaluation:
    """Evaluate as the command line asks, print the tables, write eval.json and say where."""
    record = run_record(source)
    run: RunConfig = build(RunConfig, options)
    coders = _coders(source, build(EvalConfig, {**options, "exclude_tokens": ()}), resolve_device(run.device))
    model_name = model_name or default_model(record, next(iter(coders.values())).values())
    options = with_excluded_ids(options, lambda: load_tokenizer(model_name, run))
    defaults = {"exclude_tokens": tuple(record.get("exclude_tokens", ()))} if "exclude_tokens" not in options else {}
    cfg: EvalConfig = dataclasses.replace(build(EvalConfig, options), **defaults)
    config = load_config(model_name, run)
    for name, coder in () if cfg.force else ((n, c) for group in coders.values() for n, c in group.items()):
        check_origin(name, coder, model_name)  # before the work of loading model and data
    if cfg.ce and not is_causal(config):
        logger.info("%s predicts no next token: losses are left out", config.model_type)
        cfg = dataclasses.replace(cfg, ce=False)
    model = (load_language_model if cfg.ce else load_model)(model_name, run)
    tokens, where = evaluation_tokens(
        dataset, record, options, lambda: load_tokenizer(model_name, run), config, sequences=cfg.sequences
    )
    logger.info("evaluating %d coders on %s", sum(map(len, coders.values())), where)
    evaluation = dataclasses.replace(evaluate(coders, model, tokens, cfg, model_name=model_name), dataset=where)
    _show(evaluation)
    path = Path(cfg.output) if cfg.output else _default_output(source)
    evaluation.save(path)
    Console().print(f"saved in {path}", highlight=False, soft_wrap=True)
    return evaluation


def _coders(source: str, cfg: EvalConfig, device: Any) -> dict[str, Any]:
    """Coders by the shortest names that tell their folders apart."""
    sources = list(dict.fromkeys((source, *cfg.compare)))
    short = [Path(name).name or name for name in sources]
    labels = short if len(set(short)) == len(short) else sources
    if len(labels) == 1 and cfg.compare:
        raise ConfigError(f"compare: expected other coders than {source!r}, got the same")
    return {
        label: load_coders(name, device, hookpoints=cfg.hookpoints) for label, name in zip(labels, sources, strict=True)
    }


def _default_output(source: str) -> Path:
    folder = Path(source).expanduser()
    return (folder if folder.is_dir() else Path()) / "eval.json"


def _show(evaluation: Evaluation) -> None:
    console = Console()
    console.print(reconstruction_table(evaluation))
    if (losses := loss_table(evaluation)) is not None:
        console.print()
        console.print(losses)
    for row in evaluation.coders:
        if row.reconstruction.fvu.value > 1:
            logger.warning("%s is worse than the mean: was it trained on these activations?", row.name)
