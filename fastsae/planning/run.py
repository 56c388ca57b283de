"""What ``fastsae plan`` does: configs from options, a plan, its tables or JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from .. import demo
from ..coder_config import SaeConfig
from ..config import TrainConfig
from ..model import load_tokenizer
from ..options import build
from ..run_config import RunConfig
from ..tokens import with_excluded_ids
from .config import PlanConfig
from .make import plan
from .table import show


def plan_run(options: dict[str, Any]) -> None:
    """Plan what ``fastsae train`` with the same ``options`` (by field name, and ``model`` and ``dataset``) would do."""
    name, dataset = options.get("model") or demo.NAME, options.get("dataset")
    if name == demo.NAME:
        options = {**demo.TRAINING, **options}
    run: RunConfig = build(RunConfig, options)
    options = with_excluded_ids(options, lambda: load_tokenizer(name, run))
    cfg: TrainConfig = build(TrainConfig, options, sae=build(SaeConfig, options))
    planned: PlanConfig = build(PlanConfig, options)
    made = plan(cfg, name, dataset, run, planned)
    if planned.json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        show(made, Console())
