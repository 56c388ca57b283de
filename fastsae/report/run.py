"""What ``fastsae report`` does: a run's numbers and latents gathered into one HTML file."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from ..devices import resolve_device
from ..errors import CheckpointError
from ..eval.config import EvalConfig
from ..eval.evaluate import evaluate
from ..eval.tokens import run_data
from ..model import is_causal, load_config, load_language_model, load_model, load_tokenizer
from ..options import build
from ..run_config import RunConfig
from ..saved import check_origin, default_model, load_coders, run_record
from ..token_text import token_texts, visible
from .codes import collect_codes
from .config import ReportConfig
from .curves import Chart, density_chart, read_metrics, training_charts
from .latents import choose_latents, describe_latents
from .page import render_page, write_page

logger = logging.getLogger("fastsae")


def report_run(
    source: str, model_name: str | None, dataset: str | None, options: dict[str, Any], *, progress: bool = True
) -> Path:
    """Write the report that the command line asks for, and return its path."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"run: expected the folder of a run, got {source!r}, which is no folder here")
    record = run_record(source)
    cfg: ReportConfig = build(ReportConfig, options)
    run: RunConfig = build(RunConfig, options)
    coders = load_coders(source, resolve_device(run.device), hookpoints=cfg.hookpoints)
    model_name = model_name or default_model(record, coders.values())
    for name, coder in () if cfg.force else coders.items():
        check_origin(name, coder, model_name)
    config, tokenizer = load_config(model_name, run), load_tokenizer(model_name, run)
    model = (load_language_model if is_causal(config) else load_model)(model_name, run)
    excluded = tuple(record.get("exclude_tokens", ()))

    data = run_data(dataset, record, options, lambda: tokenizer, config, sequences=EvalConfig.sequences)
    measured_on, where = data.to_evaluate(EvalConfig.sequences)
    count = max(1, cfg.look_at // len(measured_on[0]["input_ids"]))
    rows = measured_on[:count] + data.rest.take(max(0, count - len(measured_on)))
    ids, codes = collect_codes(
        coders, model, rows, batch_size=cfg.batch_size, exclude_tokens=excluded, progress=progress
    )
    chosen = {name: choose_latents(codes[name], cfg.per_coder, cfg.latents) for name in coders}
    latents = {
        name: describe_latents(coder, codes[name], chosen[name], ids, model, cfg.contexts)
        for name, coder in coders.items()
    }
    evaluation = _saved_evaluation(folder, list(coders)) if dataset is None else None
    if evaluation is None:
        eval_cfg = EvalConfig(ce=False, batch_size=cfg.batch_size, exclude_tokens=excluded, force=cfg.force)
        measured = evaluate(coders, model, measured_on, eval_cfg, model_name=model_name, progress=progress)
        evaluation = dataclasses.replace(measured, dataset=where).to_dict()
    facts = _facts(record, model_name, data.name, ids.numel(), evaluation)
    html = render_page(
        title=folder.resolve().name, facts=facts, coders=evaluation["coders"],
        charts=training_charts(
            read_metrics(folder / "metrics.jsonl"), list(coders), record.get("auxk_alpha", 0)
        ),
        densities=[_density(row) for row in evaluation["coders"]], latents=latents,
        words=lambda wanted: [visible(text) for text in token_texts(tokenizer, wanted)],
    )  # fmt: skip
    path = Path(cfg.output) if cfg.output else folder / "report.html"
    write_page(path, html)
    return path


def _saved_evaluation(folder: Path, names: list[str]) -> dict[str, Any] | None:
    """An eval.json of these coders that is later than they are, with their rows only."""
    saved = folder / "eval.json"
    if not saved.is_file() or saved.stat().st_mtime < _newest(folder):
        return None
    evaluation = json.loads(saved.read_text())
    by_name = {row["name"]: row for row in evaluation["coders"] if row["coders"] == folder.resolve().name}
    return {**evaluation, "coders": [by_name[name] for name in names]} if by_name.keys() >= set(names) else None


def _newest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.rglob("*.safetensors")), default=0.0)


def _facts(
    record: dict[str, Any], model_name: str, data_name: str, tokens: int, evaluation: dict[str, Any]
) -> dict[str, str]:
    sae = record.get("sae", {})
    facts = {"model": model_name, "data": data_name}
    if sae:
        facts["coders"] = f"{'transcoders' if sae.get('transcode') else 'autoencoders'}, k = {sae.get('k')}"
    facts["evaluated on"] = f"{evaluation['dataset'] or evaluation['sequences']}, {evaluation['tokens']:,} tokens"
    facts["latents seen on"] = f"{tokens:,} tokens"
    facts["written"] = time.strftime("%Y-%m-%d %H:%M")
    return facts


def _density(row: dict[str, Any]) -> Chart:
    density = row["reconstruction"]["density"]
    return Chart(row["name"], density_chart(density["log10_edges"], density["counts"], density["dead"]))
